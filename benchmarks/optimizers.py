"""Compares optimizers at equal time: what a tokenizer, or a prior, reaches within each of the minutes.

python -m benchmarks.optimizers --stage vqgan --minutes 1.25 2.5 --arms adamw muon muon:matrix_lr=0.04 loss=vqvae
python -m benchmarks.optimizers --stage prior --ckpt runs/vqgan/shapes --minutes 2.5 --arms adamw muon experiment=demo_prior

An arm is a file of conf/optimizer and, after colons, settings of its own: those that the file has, or any other of
train.py, as in muon:matrix_lr=0.04:batch_size=16. Settings of train.py, anywhere, apply to all arms.

Each figure is the last of a run of its own, `python train.py`, whose schedule ends with the minutes. The runs of one seed
follow each other, and each seed begins with the next arm, so what else the machine does meets all arms alike; it should be
idle all the same, and `steps` shows when it was not. With --steps in place of --minutes, runs are of equal updates instead.
A seed sets weights, batches and augmentation; a tokenizer's images are the same for all.

Prints one JSON line per run as soon as it is finished, and in the end a table of medians, with ranges over the seeds in
parentheses. With --keep, a call that is repeated continues with the runs that are missing.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from benchmarks.adversarial import train_run
from benchmarks.configs import CONF
from benchmarks.fine_tuning import discard_incomplete

COLUMNS = {  # stage -> column of the table and digits after the point
    "vqgan": {"psnr": 2, "perplexity": 0, "steps": 0},
    "prior": {"nats_per_token": 3, "steps": 0},
}


@dataclass(frozen=True)
class Arm:
    """An optimizer with its settings, as it was written and as words of train.py."""

    name: str
    words: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The name as the start of a folder's, without what train.py would read as more than a name."""
        return re.sub(r"[^\w.=-]+", "_", self.name)

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """From muon:matrix_lr=0.04:batch_size=16; ends the program if that names no optimizer or no setting."""
        name, *settings = text.split(":")
        options = sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml"))
        if name not in options:
            sys.exit(f"--arms {text}: {name} must be one of {', '.join(options)}")
        own = yaml.safe_load((CONF / "optimizer" / f"{name}.yaml").read_text())
        words = [f"optimizer={name}"]
        for setting in settings:
            key, equals, _ = setting.partition("=")
            if not key or not equals:
                sys.exit(f"--arms {text}: {setting!r} must be <setting>=<value>")
            words.append(f"optimizer.{setting}" if key in own else setting)
        return cls(text, tuple(words))


@dataclass(frozen=True)
class Comparison:
    """All runs of a call. `unit` is minutes or steps, and `marks` are the lengths of the runs in it."""

    stage: str
    arms: Sequence[Arm]
    seeds: Sequence[int]
    unit: str
    marks: Sequence[float]
    shared: Sequence[str]

    def command(self, arm: Arm, mark: float, seed: int) -> list[str]:
        """The words of train.py for one run, without its folder."""
        minutes, steps = (mark, "null") if self.unit == "minutes" else ("null", int(mark))
        budget = [f"trainer.max_minutes={minutes}", f"trainer.max_steps={steps}"]
        images = ["data.seed=0"] if self.stage == "vqgan" else []
        own = [f"seed={seed}", "logger=csv", *budget]
        return ["train.py", f"stage={self.stage}", *images, *self.shared, *arm.words, *own]

    def order(self) -> list[tuple[int, float, Arm]]:
        """All runs in the order in which they take place; each seed begins with another arm."""
        runs = []
        for n, seed in enumerate(self.seeds):
            first = n % len(self.arms)
            rotated = [*self.arms[first:], *self.arms[:first]]
            runs += [(seed, mark, arm) for mark in self.marks for arm in rotated]
        return runs

    def measure(self, folder: Path) -> list[dict[str, Any]]:
        """Train what is missing in `folder`, printing a row a run; all rows."""
        rows = []
        for seed, mark, arm in tqdm(self.order(), "runs", leave=False, disable=None):
            run = folder / f"{arm.folder}-{mark:g}-{seed}"
            discard_incomplete(run)
            train_run(self.command(arm, mark, seed), run)
            metrics = json.loads((run / "metrics.json").read_text())
            row = {"arm": arm.name, self.unit: mark, "seed": seed}
            row |= {column: metrics.get(column) for column in COLUMNS[self.stage]}
            print(json.dumps({"bench": "optimizers", "stage": self.stage, **row}), flush=True)
            rows.append(row)
        return rows

    def format(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """A Markdown table with a line for each arm and mark."""
        columns = COLUMNS[self.stage]
        lines = [f"| arm | {self.unit} | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        for mark in self.marks:
            for arm in self.arms:
                own = [r for r in rows if r["arm"] == arm.name and r[self.unit] == mark]
                cells = [
                    format_range([r[column] for r in own if r[column] is not None], digits)
                    for column, digits in columns.items()
                ]
                lines.append(f"| {arm.name} | {mark:g} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def format_range(values: Sequence[float], digits: int) -> str:
    """The median and, for several values, their range: 20.25 (20.21-20.30); a dash for none."""
    if not values:
        return "-"
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def is_setting(word: str, before: str) -> bool:
    """Whether a word of the command line is a setting of train.py; `before` is the word before it."""
    if before in ("--ckpt", "--keep"):
        return False
    return re.match(r"(~|\+{0,2}[\w./@]+=)", word) is not None


def read_comparison(words: Sequence[str] | None = None) -> tuple[Comparison, Path | None]:
    """What the command line asks for, and where the runs stay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=list(COLUMNS), default="vqgan")
    parser.add_argument("--ckpt", help="with --stage prior: the run folder of a tokenizer")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, nargs="+", help="of training; 1 if left out")
    length.add_argument("--steps", type=int, nargs="+", help="updates, in place of minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms", nargs="+", default=["adamw", "muon"], metavar="OPTIMIZER[:SETTING]"
    )
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which are not repeated")
    words = sys.argv[1:] if words is None else words
    shared = [word for flag, word in pairwise(["", *words]) if is_setting(word, flag)]
    options = parser.parse_args([word for word in words if word not in shared])
    if (options.stage == "prior") != bool(options.ckpt):
        parser.error(
            "--stage prior needs --ckpt <run folder of a tokenizer>, and no other stage does"
        )
    if options.ckpt:
        shared.insert(0, f"ckpt={options.ckpt}")
    unit, marks = ("steps", options.steps) if options.steps else ("minutes", options.minutes or [1])
    parsed = [Arm.parse(text) for text in dict.fromkeys(options.arms)]
    return Comparison(options.stage, parsed, options.seeds, unit, marks, shared), options.keep


def main() -> None:
    comparison, keep = read_comparison()
    with tempfile.TemporaryDirectory() as temporary:
        rows = comparison.measure((keep or Path(temporary)).resolve())
    print(f"\n{comparison.format(rows)}")


if __name__ == "__main__":
    main()
