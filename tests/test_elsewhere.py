"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import Command, lightning_warnings

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
VERSIONS: list[Case] = []

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
