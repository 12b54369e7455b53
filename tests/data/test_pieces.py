"""The cache of parts of large files."""

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegrid.data.pieces import PieceCache
from codegrid.data.values import UnreadableImage


class Loader:
    """Makes arrays of so many bytes, and counts how often."""

    def __init__(self, num_bytes: int = 10, seconds: float = 0) -> None:
        self.num_bytes = num_bytes
        self.seconds = seconds
        self.count = 0

    def __call__(self) -> NDArray[Any]:
        self.count += 1
        time.sleep(self.seconds)
        return np.full(self.num_bytes, self.count, np.uint8)


def test_what_was_loaded_last_is_loaded_once() -> None:
    cache, load = PieceCache(100), Loader()
    first = cache.get("a", load)
    assert cache.get("a", load) is first
    assert load.count == 1


def test_memory_has_a_bound_and_the_oldest_goes_first() -> None:
    cache, loads = PieceCache(30), {name: Loader() for name in "abcd"}
    for name in "abcad":  # a is used again, so b is the oldest
        cache.get(name, loads[name])
    assert cache.num_bytes == 30
    for name in "acd":
        cache.get(name, loads[name])
    assert {name: load.count for name, load in loads.items()} == dict.fromkeys("abcd", 1)
    cache.get("b", loads["b"])
    assert loads["b"].count == 2


def test_the_last_array_stays_whatever_its_size() -> None:
    cache, small, large = PieceCache(30), Loader(10), Loader(1000)
    cache.get("small", small)
    for _ in range(3):
        cache.get("large", large)
    assert (large.count, cache.num_bytes) == (1, 1000)
    cache.get("small", small)
    assert (small.count, cache.num_bytes) == (2, 10)


def test_threads_that_want_the_same_array_load_it_once() -> None:
    cache, load = PieceCache(100), Loader(seconds=0.02)
    threads = [threading.Thread(target=cache.get, args=("a", load)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load.count == 1


def test_a_broken_picture_is_tried_once() -> None:
    cache, tries = PieceCache(100), []

    def fail() -> NDArray[Any]:
        tries.append(1)
        raise UnreadableImage("truncated")

    for _ in range(3):
        with pytest.raises(UnreadableImage, match="truncated"):
            cache.get("a", fail)
    assert len(tries) == 1


def test_an_error_of_another_kind_can_be_tried_again() -> None:
    cache, load = PieceCache(100), Loader()

    def fail() -> NDArray[Any]:
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.get("a", fail)
    assert cache.get("a", load)[0] == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_fork_waits_for_no_thread_of_its_parent() -> None:
    from codegrid.data.pieces import held_pieces

    started, done = threading.Event(), threading.Event()

    def load_slowly() -> NDArray[Any]:
        started.set()
        done.wait(10)
        return np.zeros(3)

    thread = threading.Thread(target=held_pieces.get, args=("slow", load_slowly))
    thread.start()
    started.wait(10)
    child = os.fork()
    if not child:
        held_pieces.get("slow", lambda: np.zeros(3))
        os._exit(0)
    deadline = time.monotonic() + 5
    ended = (0, 0)
    while not ended[0] and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
    done.set()
    thread.join()
    held_pieces.clear()
    assert ended == (child, 0)
