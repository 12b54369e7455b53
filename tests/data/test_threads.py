"""Work in threads: in order, with its errors, and never longer than it may."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from codegrid.data import threads
from codegrid.data.threads import map_in_threads
from codegrid.engine.errors import InputError
from tests.helpers.configs import ROOT


@pytest.mark.parametrize("num_threads", [1, 3, 50])
def test_results_come_in_the_order_of_the_items(num_threads: int) -> None:
    def square(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(map_in_threads(square, range(20), num_threads)) == [n * n for n in range(20)]
    assert list(map_in_threads(square, [], num_threads)) == []


def test_several_items_are_worked_on_at_once() -> None:
    meeting = threading.Barrier(3)
    assert len(list(map_in_threads(lambda _: meeting.wait(5), range(3), 3))) == 3


def test_an_error_comes_at_the_place_of_its_item_and_ends_the_rest() -> None:
    started: list[int] = []

    def fail(n: int) -> int:
        started.append(n)
        time.sleep(0.002)
        if n == 2:
            raise KeyError("two")
        return n

    results = map_in_threads(fail, range(1000), 1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(results)
    assert len(started) < 10


def test_a_timeout_of_the_work_itself_is_not_taken_for_the_limit() -> None:
    def fail(n: int) -> int:
        raise TimeoutError("of a socket")

    with pytest.raises(TimeoutError, match="of a socket"):
        list(map_in_threads(fail, range(3), 1, limit=60))


def test_a_result_that_takes_longer_than_the_limit_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "SECONDS_TO_END", 0.05)
    free = threading.Event()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"no image has been read for 0.1 s .data.reader_timeout"):
        list(map_in_threads(lambda _: free.wait(30), range(3), 2, limit=0.1))
    assert time.monotonic() - start < 2
    free.set()


def test_closing_early_does_not_wait_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SECONDS_TO_END", 0.05)
    free = threading.Event()

    def hang(n: int) -> int:
        if n:
            free.wait(30)
        return n

    results = map_in_threads(hang, range(4), 4)
    assert next(results) == 0
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    free.set()


HANGING = """
    import time
    from codegrid.data.threads import map_in_threads

    def hang(n):
        print("reading", flush=True)
        time.sleep(600)

    try:
        list(map_in_threads(hang, range(8), 2))
    except KeyboardInterrupt:
        raise SystemExit(130)
"""


def test_a_program_whose_threads_hang_ends_within_seconds_of_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANGING)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    try:
        assert "reading" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
