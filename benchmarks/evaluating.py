"""Compares stage=evaluate of this checkout with that of another commit: seconds, memory, and whether the scores are equal.

git worktree add ../older <commit>
python -m benchmarks.evaluating --other ../older --tokenizer runs/vqgan/shapes --prior runs/prior/shapes --rounds 2
python -m benchmarks.evaluating --other ../older --tokenizer runs/vqgan/shapes --rounds 1 --first

Each figure is that of a whole command, `python train.py stage=evaluate ckpt=...`, without Inception and LPIPS, from the start of
its process to its end, in turns, this checkout first in every other round; the machine should be idle. A prior draws 1,000
samples. An evaluation that is not measured fills the cache of each checkout before: images, proxy and references. With `--first`
it is measured too, its images being there already. Other arguments, which stand before the options, are passed to every command,
and those of `--here` to this checkout's alone: settings that the other does not have, such as those that leave out new scores.

Prints a row for each command: seconds of the clock and of the processors, and the most memory it held in MiB. The table has medians
and the ratios of this checkout to the other, and which scores differ. JSON lines come last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkouts import HERE

SIDES = ("this", "other")
UNITS = {"seconds": "s", "cpu_seconds": "s", "peak_mib": "MiB"}
LEFT_OUT = ("inception=false", "lpips=null", "samples=1000")


def run_command(checkout: Path, words: Sequence[str]) -> dict[str, float]:
    """Run a command of train.py in a checkout; its seconds and the most memory that its process held."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "WANDB_MODE": "disabled"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if code := os.waitstatus_to_exitcode(status):
            errors.seek(0)
            sys.exit(f"{checkout}: {' '.join(words)} ended with {code}\n{errors.read()[-2000:]}")
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


class Comparison:
    """Evaluations of the same runs by both checkouts, each with a cache of its own in `folder`."""

    def __init__(
        self, checkouts: dict[str, Path], folder: Path, words: dict[str, list[str]]
    ) -> None:
        self.checkouts, self.folder, self.words = checkouts, folder, words
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[tuple[str, str], dict[str, Any]] = {}
        self.count = 0

    def read_images(self, ckpt: Path) -> None:
        """Fill both caches with the images of a tokenizer's run, and with nothing else."""
        short = ["proxy=0", "references=false", "validity=0", "rates=false"]
        for side in SIDES:
            self._evaluate("images", ckpt, side, short)

    def measure(self, kind: str, ckpt: Path, side: str, when: str) -> None:
        """Evaluate a run, and print and keep the row. The scores are kept too."""
        figures, scores = self._evaluate(kind, ckpt, side, [])
        self.scores[kind, side] = scores
        row = {"bench": "evaluating", "of": kind, "checkout": side, "when": when, **figures}
        self.rows.append(row)
        print(
            f"{kind}, {when}, {side}: {figures['seconds']} s, {figures['peak_mib']} MiB", flush=True
        )

    def _evaluate(
        self, kind: str, ckpt: Path, side: str, more: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        self.count += 1
        run = self.folder / f"{self.count}-{kind}-{side}"
        places = [f"ckpt={ckpt}", f"cache_dir={self.folder / side}", f"run_dir={run}"]
        words = ["stage=evaluate", *LEFT_OUT, *places, *self.words[side], *more]
        figures = run_command(self.checkouts[side], words)
        result = json.loads((run / "metrics.json").read_text())
        return figures, {name: result[name] for name in result["provenance"]}

    def list_differences(self, kind: str) -> list[str]:
        """The scores of both checkouts that differ, as name: this, other."""
        this, other = (self.scores[kind, side] for side in SIDES)
        common = [name for name in this if name in other]
        return [
            f"{name}: {this[name]}, {other[name]}" for name in common if this[name] != other[name]
        ]

    def format_table(self) -> str:
        """A Markdown table of the medians and ratios of each kind of command."""
        lines = ["| | this | other | ratio | |", "|---|---|---|---|---|"]
        for of, when in dict.fromkeys((row["of"], row["when"]) for row in self.rows):
            rows = [row for row in self.rows if (row["of"], row["when"]) == (of, when)]
            for name, unit in UNITS.items():
                here, there = (
                    statistics.median(row[name] for row in rows if row["checkout"] == side)
                    for side in SIDES
                )
                label = f"{of}, {when}, {name.replace('_', ' ')}"
                lines.append(
                    f"| {label} | {here:.4g} | {there:.4g} | {here / there:.3f} | {unit} |"
                )
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, required=True, help="a checkout of another commit")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a run of stage=vqgan")
    parser.add_argument("--prior", type=Path, help="a run of stage=prior on the same images")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--first", action="store_true", help="measure evaluations that train the proxy too"
    )
    parser.add_argument("--here", nargs="*", default=[], help="words for this checkout alone")
    options, extra = parser.parse_known_args()
    runs = {"tokenizer": options.tokenizer, "prior": options.prior}
    kinds = {kind: run.resolve() for kind, run in runs.items() if run}
    words = {"this": [*extra, *options.here], "other": list(extra)}
    with tempfile.TemporaryDirectory() as temporary:
        checkouts = {"this": HERE, "other": options.other.resolve()}
        comparison = Comparison(checkouts, Path(temporary), words)
        comparison.read_images(kinds["tokenizer"])
        for kind, run in kinds.items():
            for side in SIDES:
                comparison.measure(kind, run, side, "first")
        if not options.first:
            comparison.rows.clear()
        for i in range(options.rounds):
            for kind, run in kinds.items():
                for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                    comparison.measure(kind, run, side, "again")
    print(f"\n{comparison.format_table()}\n")
    for kind in kinds:
        differences = comparison.list_differences(kind)
        print(f"{kind}: {'all scores are equal' if not differences else '; '.join(differences)}")
    for row in comparison.rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
