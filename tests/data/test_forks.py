"""Work in forks: in order, with its errors, also if a fork is killed or can't be."""

import multiprocessing
import os
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegrid.data import forks
from codegrid.data.forks import map_in_forks
from tests.helpers.commands import start


def describe(n: int) -> tuple[int, int]:
    return n * n, os.getpid()


@pytest.mark.parametrize("num_forks", [1, 3, 50])
def test_results_come_in_the_order_of_the_items_from_other_processes(num_forks: int) -> None:
    results = list(map_in_forks(describe, range(20), num_forks))
    assert [square for square, _ in results] == [n * n for n in range(20)]
    workers = {pid for _, pid in results}
    assert len(workers) == min(num_forks, 20)
    assert os.getpid() not in workers
    assert list(map_in_forks(describe, [], num_forks)) == []
    assert not multiprocessing.active_children()


def test_results_may_be_larger_than_a_pipe_holds() -> None:
    arrays = [np.full(300_000, i) for i in range(5)]
    doubled = list(map_in_forks(lambda x: 2 * x, arrays, 2))
    assert all(np.array_equal(one, 2 * other) for one, other in zip(doubled, arrays, strict=True))


def test_what_a_killed_fork_does_not_return_is_computed_here() -> None:
    here = os.getpid()

    def work(n: int) -> tuple[int, bool]:
        if n == 4 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return n, os.getpid() == here

    results = list(map_in_forks(work, range(10), 2))
    assert [n for n, _ in results] == list(range(10))
    assert [n for n, is_here in results if is_here] == [4, 6, 8]


def test_an_error_comes_at_the_place_of_its_item_and_is_printed_by_no_fork(
    capfd: pytest.CaptureFixture[str],
) -> None:
    results = map_in_forks(lambda n: 12 // (n - 5), range(10), 3)
    assert [next(results) for _ in range(5)] == [12 // (n - 5) for n in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert capfd.readouterr() == ("", "")
    assert not multiprocessing.active_children()


def test_forks_end_with_the_map_whatever_they_do() -> None:
    def hang(n: int) -> int:
        time.sleep(60 * (n > 1))
        return n

    results = map_in_forks(hang, range(4), 2)
    assert [next(results), next(results)] == [0, 1]
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def refuse(*_: Any) -> None:
    raise OSError(11, "Resource temporarily unavailable")


def test_without_forks_this_process_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", refuse)
    assert list(map_in_forks(describe, range(4), 2)) == [(n * n, os.getpid()) for n in range(4)]


def test_threads_work_where_no_system_has_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks.sys, "platform", "win32")
    assert list(map_in_forks(describe, range(4), 2)) == [(n * n, os.getpid()) for n in range(4)]


@pytest.mark.slow  # imports the program
def test_forks_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    """They would wait for ever to send what nobody reads."""
    code = """
        import os, sys, time
        from codegrid.data.forks import map_in_forks
        results = map_in_forks(lambda n: (os.getpid(), bytes(10**6)), range(100), 2)
        print(next(results)[0], next(results)[0], flush=True)
        time.sleep(60)
    """
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(code))
    program = start(folder=tmp_path, program=file)
    while not program.output.read_text().endswith("\n"):
        assert program.poll(0.05) is None, program.log
    workers = [int(pid) for pid in program.output.read_text().split()]
    assert len(workers) == 2
    program.kill()
    program.wait()
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for has ended."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
