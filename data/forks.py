"""Work of many small steps of numpy in forks of this process: threads would wait for each other's steps."""

import gc
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from codegrid.data.loading import ignore_group_signals
from codegrid.data.threads import Item, Result, map_in_threads


class Fork:
    """A fork of this process, which computes `function` of its items and sends the results. Raises OSError if there can be none."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work, args=(function, items, sender, self.receiver), daemon=True
        )
        with sender, warnings.catch_warnings():
            # Python 3.12 and later warn of forks of processes with threads: `function` takes no lock that one could hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()

    def receive(self) -> tuple[Any] | None:
        """The next result; None if the fork has ended before it was sent."""
        try:
            return (self.receiver.recv(),)
        except (EOFError, OSError):
            self.end()
            return None

    def end(self) -> None:
        """End the fork, whatever it does."""
        self.process.kill()
        self.process.join()
        self.receiver.close()


def map_in_forks(
    function: Callable[[Item], Result], items: Sequence[Item], num_forks: int
) -> Generator[Result, None, None]:
    """The results of `function` for the items, in their order, computed by forks of this process.

    `function` must be pure and take no locks: it must not use torch, whose threads a fork doesn't have, and must not print. What
    a fork does not return, because it was killed or met an error, is computed by this process, which raises the error. Where
    there are no forks, threads take their place.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        yield from map_in_threads(function, items, num_forks)
        return
    forks = [_start(function, items[i::num_forks]) for i in range(min(num_forks, len(items)))]
    try:
        for i, item in enumerate(items):
            fork = forks[i % num_forks]
            result = None if fork is None else fork.receive()
            if result is None:
                forks[i % num_forks] = None
                yield function(item)
            else:
                yield result[0]
    finally:
        for fork in forks:
            if fork is not None:
                fork.end()


def _start(function: Callable[[Any], Any], items: Sequence[Any]) -> Fork | None:
    """A fork, or None if there can be none, for lack of memory or of processes that this user may have."""
    try:
        return Fork(function, items)
    except OSError:
        return None


def _work(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    sender: "Connection[Any, Any]",
    receiver: "Connection[Any, Any]",
) -> None:
    """What a fork does. An error ends it quietly: the process that waits for the result meets the error too."""
    receiver.close()  # a pipe that this process could read from would not break when the other one ends
    gc.disable()  # which would write to all memory, and so copy it
    ignore_group_signals(0)
    with suppress(Exception):
        for item in items:
            sender.send(function(item))
