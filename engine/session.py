"""Whether a run was started by a shell's command or by a call in Python, and how its next step is written there."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from codegrid.engine.program import PROGRAM

_is_call: ContextVar[bool] = ContextVar("is_call", default=False)


@contextmanager
def mark_call() -> Iterator[None]:
    """Inside, runs are calls in Python."""
    token = _is_call.set(True)
    try:
        yield
    finally:
        _is_call.reset(token)


def is_call() -> bool:
    """Whether this run is a call in Python."""
    return _is_call.get()


def format_command(words: Sequence[str]) -> str:
    """The command, or the call, of words that are quoted for a shell."""
    if not is_call():
        return f"{PROGRAM} {' '.join(words)}"
    return f"train({', '.join(map(repr, shlex.split(' '.join(words))))})"
