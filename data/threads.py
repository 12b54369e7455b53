"""Work in threads that don't keep a program alive."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

from codegrid.engine.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_TO_END = 1.0  # that an interrupted map waits for its threads


def map_in_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_threads: int,
    limit: float | None = None,
) -> Generator[Result, None, None]:
    """The results of `function` for the items, in their order, computed by several threads.

    If it ends early, by an error or by a signal, it waits for its threads for a second only: one may hang at a disk that is
    gone, and a ThreadPoolExecutor would wait for it for ever, at the end of the program too. Raises InputError if a
    result takes longer than `limit` seconds (data.reader_timeout); None for no limit.
    """
    everything = list(items)
    futures: deque[Future[Result]] = deque(Future() for _ in everything)
    tasks = deque(zip(futures, everything, strict=True))
    stopped = threading.Event()

    def work() -> None:
        while tasks and not stopped.is_set():
            try:
                future, item = tasks.popleft()
            except IndexError:  # another thread has taken the last one
                return
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(min(num_threads, len(everything)))
    ]
    for thread in threads:
        thread.start()
    try:
        while futures:
            yield wait_for_result(futures.popleft(), limit)
    finally:
        stopped.set()
        end = time.monotonic() + SECONDS_TO_END
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def wait_for_result(future: "Future[Result]", limit: float | None) -> Result:
    """The result of a future. Raises InputError after `limit` seconds without one."""
    try:
        return future.result(timeout=limit)
    except TimeoutError as error:
        if future.done():  # the function's own
            raise
        raise InputError(describe_hanging(limit)) from error


def describe_hanging(limit: float | None) -> str:
    """What is wrong if no images have arrived for so many seconds."""
    return (
        f"no image has been read for {limit:g} s (data.reader_timeout): the disk or the network that holds them hangs, or "
        "they need longer; say data.reader_timeout=<seconds>, or 0 for no limit"
    )
