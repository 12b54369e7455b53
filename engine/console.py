"""Messages and progress bars on standard error, printed by the main process alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


def log_line(sentence: str) -> None:
    """Print one line for the user above any progress bar."""
    # Imported here because it imports torch, which reading a store does not need.
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only(tqdm.write)(sentence, file=sys.stderr)


@contextmanager
def best_effort_write(file: Path) -> Iterator[None]:
    """Report an OSError that occurs while `file` is written, instead of ending the run."""
    try:
        yield
    except OSError as error:
        log_line(
            f"{file} can't be written ({error.strerror or error}): the run continues without it"
        )


def refresh_interval() -> float:
    """Seconds between two updates of a bar: short on a terminal and in a notebook, long in a log file, where each is a line."""
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return 0.5 if in_notebook or sys.stderr.isatty() else 30.0


def progress_bar(total: int, what: str, done: int = 0, shown: bool = True) -> "tqdm[Any]":
    """A bar over `total` images, for work that takes longer than a second; it disappears when it is full."""
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
