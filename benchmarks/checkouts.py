"""Compares this checkout with one of another commit: loading of photographs at 64 pixels, a run of one step, and its memory.

git worktree add ../older <commit>
python -m benchmarks.checkouts --other ../older --root photos --rounds 7

Each figure is measured in a process of its own, in turns, this checkout first in every other round: batches a second out of the
cache and decoded on each access, seconds of a run of one step from its start to its end, and the memory that it takes at most.
The machine should be idle. Prints a table of medians and of the ratios of each round, this checkout to the other; above 1 is more.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
UNITS = {
    "cached": "batches of 32 a second",
    "decoded": "batches of 32 a second",
    "first step": "s",
    "memory": "MiB",
}
# Runs in either checkout, so it uses nothing but what both have.
LOADING = """
import json, sys, time
from hydra.utils import instantiate
from benchmarks.configs import compose_config
rates = {}
for name, words, n in (("cached", ["data.cache=disk"], 3000), ("decoded", ["data.cache=none", "data.num_workers=0"], 1000)):
    config = compose_config("stage=vqgan", "data=folder", f"data.root={sys.argv[1]}", f"cache_dir={sys.argv[2]}", *words)
    data = instantiate(config.data)
    data.prepare_data()
    batches = iter(data.train_dataloader())
    for _ in range(10):
        data.augment(next(batches)[0])
    began = time.perf_counter()
    for _ in range(n):
        data.augment(next(batches)[0])
    rates[name] = n / (time.perf_counter() - began)
print(json.dumps(rates))
"""
STEP = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run([sys.executable, "train.py", *sys.argv[1:]], check=True, capture_output=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"first step": time.perf_counter() - began, "memory": peak}))
"""


def measure(checkout: Path, root: Path, folder: Path) -> dict[str, float]:
    """The figures of one checkout in one round; `folder` is for its cache and its run."""
    cache, run = folder / "cache", folder / "run"
    step = [
        "stage=vqgan", "data=folder", f"data.root={root}", f"cache_dir={cache}", f"run_dir={run}", "logger=csv",
        "trainer.max_steps=1", "trainer.val_every=1",
    ]  # fmt: skip
    figures = run_code(checkout, LOADING, str(root), str(cache))
    figures |= run_code(checkout, STEP, *step)
    shutil.rmtree(run)
    return figures


def run_code(checkout: Path, code: str, *words: str) -> dict[str, float]:
    """The last line, JSON, of what a program prints in a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@contextmanager
def imports_from(checkout: Path) -> Iterator[None]:
    """Within, imports of Codegrid's packages, and the classes that configs name, are another checkout's.

    Its modules stand beside those of this checkout and keep to each other; what they import later, inside of functions, is this
    checkout's.
    """
    ours = {name: module for name, module in sys.modules.items() if is_codegrids(name)}
    path = sys.path[:]
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(checkout.resolve()))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if is_codegrids(name)]:
            del sys.modules[name]
        sys.modules.update(ours)


def is_codegrids(name: str) -> bool:
    """Whether a module is one of Codegrid's packages, or in one."""
    return name.split(".")[0] in ("codegrid", "prior", "vqgan")


def format_comparison(
    rounds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> str:
    """A Markdown table of the figures of this checkout and the other in each round."""
    lines = ["| | this | other | ratio (range) | unit |", "|---|---|---|---|---|"]
    for name, unit in UNITS.items():
        here, there = ([figures[name] for figures in side] for side in zip(*rounds, strict=True))
        ratios = [a / b for a, b in zip(here, there, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(here):.4g} | {statistics.median(there):.4g} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) | {unit} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, required=True, help="a checkout of another commit")
    parser.add_argument("--root", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    checkouts = [HERE, options.other.resolve()]
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in ("this", "other")]
        for i in tqdm(range(options.rounds), "rounds", leave=False, disable=None):
            figures: dict[int, dict[str, float]] = {}
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                figures[side] = measure(checkouts[side], options.root.resolve(), folders[side])
            print(
                json.dumps({"bench": "checkouts", "this": figures[0], "other": figures[1]}),
                flush=True,
            )
            rounds.append((figures[0], figures[1]))
    print(f"\n{format_comparison(rounds)}")


if __name__ == "__main__":
    main()
