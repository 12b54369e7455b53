"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.report import make_run_folder
from tests.helpers.commands import TINY, Command, lightning_warnings

pytestmark = lightning_warnings

Prepare = Callable[[Path, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """One row: `name` is a sentence; `prepare` makes the input in the folder where the command runs."""

    name: str
    prepare: Prepare
    words: tuple[str, ...]
    expected: str  # part of what the command prints
    code: int = 0
    trains: bool = False  # then the row is one of the slow tests


def nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is needed."""


# What is only recorded about a machine may be missing; every wait has an end.
MACHINE: list[Case] = []


def runs_of_two_seeds(
    folder: Path, figures: dict[int, tuple[float, float]], **data: object
) -> None:
    """Finished tokenizers below runs: for each K the PSNR of seed 0 and of seed 1, as an earlier version wrote them."""
    random = np.random.default_rng(0)
    images = {"_target_": "data.folder.Folder", "n_val": 32, "held_out": "random", **data}
    for K, values in figures.items():
        for seed, psnr in enumerate(values):
            at, settings = folder / f"runs/{K}-{seed}", {"seed": seed, "data": images}
            measured = {"psnr": psnr, "K": K, "grid": [4, 4]}
            settings["quantizer"] = {"K": K}
            words = ("train.py", {"psnr": [1.0]}, "reconstructions", random)
            make_run_folder(at, "vqgan", f"{K}{seed}", settings, measured, *words)


def blank_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of one shade of white each, in a folder of their own for validation."""
    for split, shades in (("train", range(200, 216)), ("val", range(248, 256))):
        (folder / split).mkdir()
        for shade in shades:
            Image.new("L", (16, 16), shade).save(folder / split / f"{shade}.png")


BLANK = [
    *(word for word in TINY if not word.startswith(("data.n_", "trainer.max_steps"))),
    "stage=vqgan", "loss=vqvae", "data=folder", "data.root=train", "data.val_root=val", "trainer.max_steps=2",
]  # fmt: skip

# A figure is a number, or null with a reason.
NUMBERS: list[Case] = [
    Case(
        "infinite_psnr_of_earlier_runs_is_named",
        lambda folder, _: runs_of_two_seeds(folder, {16: (20.0, math.inf), 64: (21.0, 21.5)}),
        ("stage=report", "runs=runs"),
        "PSNR of 1 run is left out: it is infinite; stage=evaluate measures it.",
    ),
    Case(
        "a_lead_within_each_seed_is_clear_though_the_seeds_differ",
        lambda folder, _: runs_of_two_seeds(folder, {16: (19.0, 24.0), 64: (19.8, 24.85)}),
        ("stage=report", "runs=runs"),
        "paired by seed, 0.83 ± 0.32 dB ahead of 4×4, K=16.",
    ),
    Case(
        "a_lead_that_changes_with_the_seed_is_uncertain",
        lambda folder, _: runs_of_two_seeds(folder, {16: (20.0, 21.0), 64: (20.6, 20.9)}),
        ("stage=report", "runs=runs"),
        "paired by seed, the lead over 4×4, K=16 (0.25 ± 4.45 dB) is uncertain.",
    ),
    Case(
        "older_runs_say_that_the_seed_chose_their_images",
        lambda folder, _: runs_of_two_seeds(folder, {16: (20.0, 21.0)}, split_seed=None),
        ("stage=report", "runs=runs"),
        "In 1 of 1 configuration the seed also chose the validation images",
    ),
    Case(
        "sharpness_of_blank_pages_is_null_with_a_reason",
        blank_pages,
        (*BLANK, "run_dir=white"),
        '"absent": {"sharpness": "the images have no gradients',
        trains=True,
    ),
    Case(
        "an_objective_that_is_no_number_is_a_sentence",
        blank_pages,
        ("-m", *BLANK, "sweep=white", "quantizer.K=16,32", "objective=sharpness"),
        "objective=sharpness of runs/sweeps/white/1_quantizer.K-32 can't be compared: the images have no",
        code=2,
        trains=True,
    ),
]

# A value is taken as it is typed.
WORDS: list[Case] = []

# Where things are can change; what a run is can't.
MOVED: list[Case] = []

# Another version, damage and mistrust are three sentences; classes of one's own are admitted by name.
VERSIONS: list[Case] = []

# A split stays when files come or go.
SPLIT: list[Case] = []

# A decision about somebody's data is printed.
SUMMARY: list[Case] = []

# Samples are written as they come.
SAMPLES: list[Case] = []

CASES = [*MACHINE, *NUMBERS, *WORDS, *MOVED, *VERSIONS, *SPLIT, *SUMMARY, *SAMPLES]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.trains else [])
        for case in CASES
    ],
)
def test_what_people_meet_elsewhere(
    case: Case,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case.prepare(tmp_path, monkeypatch)
    code = command(*case.words)
    printed = capsys.readouterr()
    assert code == case.code, printed.err
    assert case.expected in printed.out + printed.err
