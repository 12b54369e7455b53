"""Looks for leaks of memory, open files and processes in a long run with many validations, pictures and checkpoints.

python -m benchmarks.soak --steps 2000
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.n_train=256", "data.n_val=32", "data.batch_size=8", "data.image_size=16", "model.grid=4", "model.width=8",
    "model.encoder.depth=1", "model.decoder.depth=1", "quantizer.K=16", "quantizer.dim=8", "loss.discriminator.width=8",
]  # fmt: skip
SMALL_PRIOR = [
    "prior.width=16",
    "prior.depth=1",
    "prior.heads=2",
    "batch_size=8",
    "callbacks.stop=null",
]
INTERVALS = [
    "trainer.accelerator=cpu",
    "trainer.val_every=50",
    "trainer.save_every=25",
    "trainer.log_every=10",
    "logger=csv",
]
WARM_UP = 0.25  # share of a run after which nothing should grow


def start_run(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start `train.py <words>` on the CPU with `folder` as its working directory."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *words, *INTERVALS]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def count_open_files(pid: int) -> int:
    """The number of files that a process has open; 0 if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def list_children(pid: int) -> set[int]:
    """The ids of a process's running children."""
    try:
        lines = [
            Path(f"/proc/{pid}/task/{thread}/children").read_text()
            for thread in os.listdir(f"/proc/{pid}/task")
        ]
    except OSError:
        return set()
    return {int(child) for line in lines for child in line.split()}


def list_shared_memory() -> set[str]:
    """The names of this user's shared-memory blocks."""
    names = set[str]()
    for file in Path("/dev/shm").iterdir():
        with suppress(FileNotFoundError):  # it was temporary
            if file.is_file() and file.stat().st_uid == os.getuid():
                names.add(file.name)
    return names


def list_leaked_memory(before: set[str], seconds: float = 20) -> set[str]:
    """The new shared-memory blocks that no running process has open after that many seconds.

    Blocks of other programs come and go meanwhile (a sweep by joblib has eight), so one that a process has open is no leak.
    """
    deadline = time.monotonic() + seconds
    while True:
        new = list_shared_memory() - before
        leaked = new and new - list_open_shared_memory()
        if not leaked or time.monotonic() >= deadline:
            return leaked
        time.sleep(0.2)


def list_open_shared_memory() -> set[str]:
    """The names of the shared-memory blocks that running processes have open or mapped."""
    paths = list[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            maps = (process / "maps").read_text().splitlines()
            paths += [line.split(maxsplit=5)[-1] for line in maps]
            for file in (process / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    paths.append(os.readlink(file))
    return {Path(path).parts[3] for path in paths if path.startswith("/dev/shm/")}


def list_survivors(pids: set[int], seconds: float = 20) -> set[int]:
    """The processes that are still running after that many seconds; returns at once when all have ended."""
    deadline = time.monotonic() + seconds
    while True:
        survivors = {pid for pid in pids if Path(f"/proc/{pid}").exists()}
        if not survivors or time.monotonic() >= deadline:
            return survivors
        time.sleep(0.2)


def read_memory(folder: Path) -> list[float]:
    """The memory that a run logged, in GiB, from its first step to its last."""
    with (folder / "csv/version_0/metrics.csv").open(newline="") as lines:
        return [
            float(row["train/memory_gib"])
            for row in csv.DictReader(lines)
            if row["train/memory_gib"]
        ]


def soak(words: Sequence[str], folder: Path, steps: int, run: str) -> dict[str, Any]:
    """Train for that many steps; returns what the run leaves behind, and how much its memory grew after the warm-up.

    growth             relative growth of the median memory from the end of the warm-up to the end of the run
    open_files         median numbers of open files in the first and the second half
    """
    shared_before = list_shared_memory()
    children = set[int]()
    open_files = list[int]()
    process = start_run([*words, f"run_dir={run}", f"trainer.max_steps={steps}"], folder)
    while process.poll() is None:
        children |= list_children(process.pid)
        n = count_open_files(process.pid)
        if n and (folder / run / "csv").is_dir():
            open_files.append(n)
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    memory = read_memory(folder / run)
    tenth = max(1, len(memory) // 10)
    warm = memory[int(WARM_UP * len(memory)) :][:tenth]
    end = memory[-tenth:]
    middle = len(open_files) // 2
    return {
        "memory_gib": round(median(end), 4),
        "growth": round(median(end) / median(warm) - 1, 4),
        "open_files": [median(open_files[:middle]), median(open_files[middle:])],
        "processes_left": len(list_survivors(children)),
        "shared_memory_left": sorted(list_leaked_memory(shared_before)),
    }


def crash(words: Sequence[str], folder: Path, run: str) -> dict[str, Any]:
    """Kill a run while it trains; returns the number of its workers, and what it leaves behind."""
    shared_before = list_shared_memory()
    process = start_run([*words, f"run_dir={run}", "trainer.max_steps=1000000"], folder)
    while process.poll() is None and not (folder / run / "checkpoints/last.ckpt").is_file():
        time.sleep(0.05)
    children = list_children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {
        "workers": len(children),
        "processes_left": len(list_survivors(children)),
        "shared_memory_left": sorted(list_leaked_memory(shared_before)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="updates of each stage")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for stage, words in {"vqgan": SMALL, "prior": [*SMALL_PRIOR, "ckpt=vqgan"]}.items():
            leaks = soak([f"stage={stage}", *words], folder, options.steps, stage)
            row = {"bench": "soak", "stage": stage, "steps": options.steps, **leaks}
            print(json.dumps(row), flush=True)
        leaks = crash(["stage=vqgan", *SMALL, "data.num_workers=2"], folder, "killed")
        print(json.dumps({"bench": "soak", "stage": "vqgan", "killed": True, **leaks}))


if __name__ == "__main__":
    main()
