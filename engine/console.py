"""What is said on the terminal while a program works: once, however many processes it has, and never on standard output."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


def log_line(sentence: str) -> None:
    """One line for the person at the keyboard, above any progress bar."""
    from lightning.fabric.utilities.rank_zero import (
        rank_zero_only,  # here, for it imports torch, which a store can do without
    )

    rank_zero_only(tqdm.write)(sentence, file=sys.stderr)


@contextmanager
def best_effort_write(file: Path) -> Iterator[None]:
    """Inside, a file is written that no run should die for: where it can't be, that is said and the program goes on."""
    try:
        yield
    except OSError as error:
        log_line(f"{file} can't be written ({error.strerror or error}): the run goes on without it")


def refresh_interval() -> float:
    """Seconds between two states of a bar: short on a terminal, long where each would be a line in a log file."""
    return 0.5 if sys.stderr.isatty() else 30.0


def progress_bar(total: int, what: str, done: int = 0, shown: bool = True) -> "tqdm[Any]":
    """A bar over so many images, for work that takes longer than a second; it goes away when it is full."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=" images",
        leave=False,
        mininterval=refresh_interval(),
        delay=1,
        disable=not shown,
    )
