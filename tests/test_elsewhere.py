"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.commands import Command, lightning_warnings
from tests.helpers.configs import ROOT

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


def nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is needed."""


# What is only recorded about a machine may be missing; every wait has an end.
MACHINE: list[Case] = []

# A figure is a number, or null with a reason.
NUMBERS: list[Case] = []

# A value is taken as it is typed.
WORDS: list[Case] = []

# Where things are can change; what a run is can't.
MOVED: list[Case] = []

# Another version, damage and mistrust are three sentences; classes of one's own are admitted by name.
EARLIER = ROOT / "tests" / "fixtures" / "run_of_0_1"


def earlier_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer and a prior of version 0.1."""
    for name in ("tokenizer", "prior"):
        shutil.copytree(EARLIER / name, folder / name)


def of_earlier_code(change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """These runs, with a checkpoint of the tokenizer as other code wrote it."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        earlier_runs(folder, monkeypatch)
        file = folder / "tokenizer" / "checkpoints" / "last.ckpt"
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)

    return prepare


def with_config(text: str) -> Prepare:
    """These runs, with more in the tokenizer's config.yaml."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        earlier_runs(folder, monkeypatch)
        with (folder / "tokenizer" / "config.yaml").open("a") as config:
            config.write(text)

    return prepare


def mine(content: dict[str, Any]) -> None:
    content["codegrid"]["config"]["quantizer"]["_target_"] = "mylab.Residual"


RESUME = ("stage=vqgan", "resume=tokenizer", "trainer.max_steps=9")
EVALUATE = ("stage=evaluate", "ckpt=tokenizer", "accelerator=cpu", "lpips=null")
VERSIONS: list[Case] = [
    Case(
        "a resumed run of other code with other weights is of another version",
        of_earlier_code(lambda content: content["state_dict"].popitem()),
        RESUME,
        "was written by Codegrid 0.1 or earlier, and this program is",
        2,
    ),
    Case(
        "a resumed run of a program that saved no random state is of another version",
        of_earlier_code(lambda content: content.pop("random")),
        RESUME,
        "it lacks random; use the version that wrote it",
        2,
    ),
    Case(
        "a resumed run of a later program needs that one",
        with_config("codegrid: {version: 3.1.0, format: 99}\n"),
        RESUME,
        "config.yaml was written by Codegrid 3.1.0 and has format 99, this program reads up to",
        2,
    ),
    Case(
        "a tokenizer whose quantizer is gone is of another version",
        of_earlier_code(
            lambda c: c["codegrid"]["config"]["quantizer"].update(
                _target_="vqgan.quantizers.tree.Tree"
            )
        ),
        EVALUATE,
        "it has no vqgan.quantizers.tree.Tree; use the version that wrote it",
        2,
    ),
    Case(
        "a prior on a tokenizer whose header lacks its config is refused by its version",
        of_earlier_code(lambda content: content["codegrid"].pop("config")),
        ("stage=prior", "ckpt=tokenizer"),
        "its header lacks config; use the version that wrote it",
        2,
    ),
    Case(
        "a checkpoint with a function of numpy asks for what no checkpoint needs",
        of_earlier_code(lambda content: content.update(psnr=np.float64(20.5))),
        ("stage=extract", "ckpt=tokenizer"),
        "which reading a checkpoint of Codegrid never needs; don't trust the file",
        2,
    ),
    Case(
        "a quantizer of ones own is refused with the word that admits it",
        of_earlier_code(mine),
        EVALUATE,
        "add trust=[mylab.Residual], else don't trust the file",
        2,
    ),
    Case(
        "a class that is admitted and can't be imported is named with the way to it",
        of_earlier_code(mine),
        (*EVALUATE, "trust=[mylab.Residual]"),
        "mylab.Residual can't be imported; if it is a class of your own, put the folder of its module on PYTHONPATH",
        2,
    ),
    Case(
        "another choice of data than the checkpoint's is refused in a later stage",
        earlier_runs,
        (*EVALUATE, "data=cifar10"),
        "this command chooses data.torchvision.CIFAR10 for data, and the checkpoint has data.shapes.Shapes, which stays",
        2,
    ),
    Case(
        "a word of trust that is no name of a class is refused",
        earlier_runs,
        (*RESUME, "trust=[Residual]"),
        "trust=Residual must be the full name of a class",
        2,
    ),
    Case(
        "python itself is never admitted",
        earlier_runs,
        ("stage=sample", "ckpt=prior", "trust=[shutil.rmtree]"),
        "trust=shutil.rmtree is part of Python itself",
        2,
    ),
]

# A split stays when files come or go.
SPLIT: list[Case] = []

# A decision about somebody's data is printed.
SUMMARY: list[Case] = []

# Samples are written as they come.
SAMPLES: list[Case] = []

CASES = [*MACHINE, *NUMBERS, *WORDS, *MOVED, *VERSIONS, *SPLIT, *SUMMARY, *SAMPLES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
