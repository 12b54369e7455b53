"""Waits that a signal may end at once: for a batch, between two updates, the state of a run is complete."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_starts: list[float] = []  # when each wait began that this process is in, the outermost first
_enders: list[
    Callable[[], None]
] = []  # of the run that trains; they end it if it has received a signal


@contextmanager
def interruptible_wait() -> Iterator[None]:
    """Let a signal end the run while the body waits, also one that came just before."""
    _starts.append(time.monotonic())
    try:
        end_if_signalled()
        yield
    finally:
        _starts.pop()


def waiting_since() -> float | None:
    """When the wait began that this process is in, by time.monotonic; None if it is in none."""
    return _starts[0] if _starts else None


def end_if_signalled() -> None:
    """End the run if it has received a signal and may end here; to be called again while a wait lasts."""
    for ender in _enders[-1:]:
        ender()


@contextmanager
def ends_waits(ender: Callable[[], None]) -> Iterator[None]:
    """Inside, `ender` decides whether a wait ends, by raising."""
    _enders.append(ender)
    try:
        yield
    finally:
        _enders.remove(ender)
