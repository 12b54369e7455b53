"""Whether a long run keeps to its memory, its files and its processes: training, validations, pictures and checkpoints in a loop.

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
ROUND = [
    "trainer.accelerator=cpu",
    "trainer.val_every=50",
    "trainer.save_every=25",
    "trainer.log_every=10",
    "logger=csv",
]
WARM = 0.25  # the share of a run after which nothing should grow any more


def start(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, str(ROOT / "train.py"), *words, *ROUND]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def handles(process: int) -> int:
    """How many files a process has open; 0 where it is gone."""
    try:
        return len(os.listdir(f"/proc/{process}/fd"))
    except OSError:
        return 0


def children(process: int) -> set[int]:
    """The processes that a process has started and that are still there."""
    try:
        told = [
            Path(f"/proc/{process}/task/{thread}/children").read_text()
            for thread in os.listdir(f"/proc/{process}/task")
        ]
    except OSError:
        return set()
    return {int(number) for line in told for number in line.split()}


def shared() -> set[str]:
    """The blocks of shared memory of this user."""
    return {file.name for file in Path("/dev/shm").iterdir() if file.owner() == Path.home().owner()}


def alive(processes: set[int], seconds: float = 20) -> set[int]:
    """Those that don't end within so many seconds."""
    deadline = time.monotonic() + seconds
    while (
        left := {number for number in processes if Path(f"/proc/{number}").exists()}
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def memory(folder: Path) -> list[float]:
    """What the run says of its memory, GiB, from its first step to its last."""
    with (folder / "csv/version_0/metrics.csv").open(newline="") as lines:
        return [
            float(row["train/memory_gib"])
            for row in csv.DictReader(lines)
            if row["train/memory_gib"]
        ]


def soak(words: Sequence[str], folder: Path, steps: int, run: str) -> dict[str, Any]:
    """What a run of so many steps leaves behind, and how much more it holds at its end than when it was warm."""
    before, seen, open_files = shared(), set[int](), list[int]()
    process = start([*words, f"run_dir={run}", f"trainer.max_steps={steps}"], folder)
    while process.poll() is None:
        seen |= children(process.pid)
        if (folder / run / "csv").is_dir() and (found := handles(process.pid)):
            open_files.append(found)
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"the run ended with code {process.returncode}")
    held = memory(folder / run)
    warm, end = (
        held[int(WARM * len(held)) :][: max(1, len(held) // 10)],
        held[-max(1, len(held) // 10) :],
    )
    middle = len(open_files) // 2
    return {
        "memory_gib": round(median(end), 4),
        "growth": round(median(end) / median(warm) - 1, 4),
        "open_files": [median(open_files[:middle]), median(open_files[middle:])],
        "processes_left": len(alive(seen)),
        "shared_memory_left": len(shared() - before),
    }


def crash(words: Sequence[str], folder: Path, run: str) -> dict[str, Any]:
    """What a run that is killed in its training leaves behind."""
    before = shared()
    process = start([*words, f"run_dir={run}", "trainer.max_steps=1000000"], folder)
    while process.poll() is None and not (folder / run / "checkpoints/last.ckpt").is_file():
        time.sleep(0.05)
    seen = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {
        "workers": len(seen),
        "processes_left": len(alive(seen)),
        "shared_memory_left": len(shared() - before),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--steps", type=int, default=2000, help="updates of each stage")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        for stage, words in {"vqgan": SMALL, "prior": [*SMALL_PRIOR, "ckpt=vqgan"]}.items():
            found = soak([f"stage={stage}", *words], where, given.steps, stage)
            print(
                json.dumps({"bench": "soak", "stage": stage, "steps": given.steps, **found}),
                flush=True,
            )
        found = crash(["stage=vqgan", *SMALL, "data.num_workers=2"], where, "killed")
        print(json.dumps({"bench": "soak", "stage": "vqgan", "killed": True, **found}))


if __name__ == "__main__":
    main()
