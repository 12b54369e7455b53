"""A run folder: every file name in it, once, and how it is made."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from codegrid.engine.console import best_effort_write
from codegrid.engine.errors import InputError
from codegrid.engine.figures import format_figures
from codegrid.engine.locks import POLL, Lock
from codegrid.engine.words import format_word

CONFIG = "config.yaml"
RECORD = "record.jsonl"  # one line per start: command, versions, machine
METRICS = "metrics.json"  # final figures; a folder that has it holds a finished run
CARD = "card.md"
DOCTOR = "doctor.txt"
PICTURES = "pictures"
SAMPLES = "samples.jsonl"  # the batches of samples on disk: see prior/saving.py
IMAGES = "images.npz"  # which images the run was trained on: see data/identity.py
RATES = "rates.csv"  # the rate-distortion curve of an evaluation
PRUNE_SERIES = "prune.jsonl"  # the validations of a sweep's point, for the other points to read
CSV = Path("csv") / "version_0" / "metrics.csv"
CHECKPOINTS = Path("checkpoints")
LAST = CHECKPOINTS / "last.ckpt"  # to resume from
PREVIOUS = CHECKPOINTS / "previous.ckpt"  # the one before, in case the last is damaged
BEST = CHECKPOINTS / "best.ckpt"  # to be used, where a run looks for it
LOCK = ".lock"  # held by the process that writes into the folder
DAMAGED = CHECKPOINTS / "damaged.ckpt"  # a damaged one that was set aside

MAX_NAME = 250  # bytes; file systems allow 255, and a number may follow


def choose_folder(stage: str, name: str, run_dir: str | None) -> Path:
    """The folder of a new run: `run_dir`, or runs/<stage>/<name>, numbered if an earlier run has it.

    Raises InputError for a name with a path in it and for a folder that is not empty.
    """
    if name in (".", "..") or Path(name).name != name:
        raise InputError(
            f"name={name} must be the name of one folder below runs/{stage}; "
            "a path goes to run_dir="
        )
    check_name_length("name", name)
    folder = Path(run_dir) if run_dir else next_free_folder(Path("runs") / stage / name)
    if run_dir and folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"run_dir={folder} is not empty; continue that run with {format_word('resume', folder)}, "
            "or name another folder"
        )
    return folder


def check_name_length(setting: str, name: str) -> None:
    """Raise InputError for a name that no file system takes."""
    if len(os.fsencode(name)) > MAX_NAME:
        raise InputError(
            f"{setting}={name} is longer than the {MAX_NAME} bytes of a folder's name; set a shorter {setting}="
        )


def make_run_folder(stage: str, name: str, run_dir: str | None) -> Path:
    """Make the folder that `choose_folder` chooses, for this run alone: of runs that start at the same moment each gets another.

    A folder belongs to the run that makes its record.jsonl, which fails if the file exists; mkdir of an existing folder fails
    too, but `run_dir` may be one. Raises InputError, and OSError if the folder can't be made.
    """
    while True:
        folder = choose_folder(stage, name, run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=run_dir is not None)
            (folder / RECORD).open("x").close()
        except FileExistsError as error:
            if not folder.is_dir():
                raise
            if run_dir is not None:
                raise InputError(
                    f"run_dir={folder} was taken by another run at this moment; name another folder"
                ) from error
        else:
            return folder


def is_mere_claim(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run that was killed at its very start leaves."""
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir()}
    return bool(names) and names <= {RECORD, LOCK, f"{CONFIG}.tmp"}


def lock_folder(folder: Path, seconds: float = 15.0) -> Lock:
    """Take the lock of a run folder, so that a run is not resumed twice at the same time, nor while it still runs.

    Waits for some seconds: the readers of a run that was killed may hold its lock that long. Raises InputError if
    another process has the lock, and OSError if its file can't be written.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return Lock(folder / LOCK).take()
        except Timeout as error:
            if time.monotonic() > end:
                raise InputError(
                    f"the run in {folder} is running in another process; wait for it, or end it, "
                    f"and then say {format_word('resume', folder)}"
                ) from error
        time.sleep(POLL)


def next_free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 ... that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def remove_unused(folder: Path) -> None:
    """Remove a run folder that this process has made, and in which no run has begun."""
    shutil.rmtree(folder, ignore_errors=True)


def write_config(folder: Path, text: str) -> None:
    """Write config.yaml, whole or not at all: half a config would be that of another run."""
    write_atomically(folder / CONFIG, text)


def append_record(folder: Path, origin: Mapping[str, Any], data: Mapping[str, Any] | None) -> None:
    """Add this start to record.jsonl: the time, its `origin` (command, versions, machine), facts of the data."""
    record = {"time": datetime.now().isoformat(timespec="seconds"), **origin}
    if data:
        record["data"] = data
    with (folder / RECORD).open("a") as lines:
        lines.write(format_figures(record) + "\n")


@dataclass(frozen=True)
class Before:
    """What a resumed start adds to or changes in a run folder, as it was before."""

    record_size: int  # bytes of record.jsonl
    config: str

    @classmethod
    def read(cls, folder: Path) -> "Before":
        record = folder / RECORD
        size = record.stat().st_size if record.is_file() else 0
        return cls(size, (folder / CONFIG).read_text())

    def restore(self, folder: Path) -> None:
        """Take back a start that came to nothing."""
        with best_effort_write(folder / RECORD):
            os.truncate(folder / RECORD, self.record_size)
            if (folder / CONFIG).read_text() != self.config:
                write_config(folder, self.config)


def read_record(folder: Path, name: str) -> Any:
    """What the last start in record.jsonl that has an entry `name` says there; None if there is none.

    Lines that are not whole, as after a full disk, are skipped.
    """
    if not (folder / RECORD).is_file():
        return None
    for line in reversed((folder / RECORD).read_text(errors="replace").splitlines()):
        try:
            start = json.loads(line)
        except ValueError:
            continue
        if isinstance(start, dict) and name in start:
            return start[name]
    return None


def write_metrics(folder: Path, result: Mapping[str, Any]) -> None:
    """Write metrics.json. Raises InputError, with the figures in it, if the disk refuses."""
    try:
        write_atomically(folder / METRICS, format_figures(result, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{folder / METRICS} can't be written ({error.strerror or error}): {format_figures(result)}"
        ) from error


def write_atomically(file: Path, text: str) -> None:
    """Write a small text file so that it is there whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)
