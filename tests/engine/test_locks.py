"""Locks between processes: on any file system, and no wait for one is endless."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLock, Timeout

from codegrid.engine import locks
from codegrid.engine.errors import InputError
from codegrid.engine.locks import Lock


def without_locks(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A file system where a lock raises this."""

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("codegrid.engine.locks.FileLock.acquire", refuse)


NO_LOCKS = [
    OSError(errno.ENOLCK, "No locks available"),
    OSError(errno.EOPNOTSUPP, "Operation not supported"),
    NotImplementedError("FileSystem does not appear to support flock"),
]


def test_a_lock_is_one_processs_until_it_is_released(tmp_path: Path) -> None:
    with Lock(tmp_path / "a.lock").take() as lock:
        assert lock.is_held
        with pytest.raises(Timeout):
            Lock(tmp_path / "a.lock").take()
    assert not lock.is_held
    Lock(tmp_path / "a.lock").take().release()


@pytest.mark.parametrize("error", NO_LOCKS, ids=lambda error: type(error).__name__ + str(error))
def test_without_locks_a_file_stands_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    without_locks(monkeypatch, error)
    with Lock(tmp_path / "a.lock").take():
        with pytest.raises(Timeout):
            Lock(tmp_path / "a.lock").take()
        with Lock(tmp_path / "b.lock").take():
            pass
    assert not list(tmp_path.iterdir()), "the file is removed with the lock"


def test_the_file_of_a_process_of_another_machine_that_has_ended_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, NO_LOCKS[0])
    marker = tmp_path / "a.held.lock"
    marker.write_text("4711\nanother-machine\n")
    with pytest.raises(Timeout):
        Lock(tmp_path / "a.lock").take()
    past = time.time() - 2 * locks.PATIENCE
    os.utime(marker, (past, past))
    with Lock(tmp_path / "a.lock").take() as lock:
        assert lock.is_held


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_other_errors_of_the_disk_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without_locks(monkeypatch, OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=os.strerror(number)):
        Lock(tmp_path / "a.lock").take()


@pytest.mark.parametrize("soft", [False, True])
def test_a_wait_ends_when_the_lock_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if soft:
        without_locks(monkeypatch, NO_LOCKS[0])
    monkeypatch.setattr(locks, "POLL", 0.01)
    monkeypatch.setattr(locks, "SECONDS_UNTIL_NOTICE", 0.02)
    holder = Lock(tmp_path / "a.lock").take()
    polls = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 30:
            holder.release()
        time_sleep(seconds)

    time_sleep = time.sleep
    monkeypatch.setattr("codegrid.engine.locks.time.sleep", sleep)
    with Lock(tmp_path / "a.lock").wait("cache/x", "do otherwise") as lock:
        assert lock.is_held
    assert (
        capsys.readouterr().err.count("cache/x is being made by another run; waiting for it") == 1
    )


def test_a_wait_for_a_holder_without_a_sign_of_life_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    monkeypatch.setattr(locks, "BEAT", 60)  # as if the holder were stopped
    holder = Lock(tmp_path / "a.lock").take()
    with pytest.raises(
        InputError,
        match=r"cache/x is being made by another run, which has shown no sign of life for 0.005 minutes.*or use y",
    ):
        Lock(tmp_path / "a.lock").wait("cache/x", "use y")
    holder.release()


def test_a_holder_that_lives_is_waited_for_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "POLL", 0.02)
    holder = Lock(tmp_path / "a.lock").take()
    start = time.monotonic()
    sleep = time.sleep

    def release_late(seconds: float) -> None:
        if time.monotonic() - start > 0.6:
            holder.release()
        sleep(seconds)

    monkeypatch.setattr("codegrid.engine.locks.time.sleep", release_late)
    with Lock(tmp_path / "a.lock").wait("cache/x", "use y"):
        assert time.monotonic() - start > 0.5


@pytest.mark.parametrize("soft", [False, True])
def test_waiters_leave_the_sign_of_life_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool
) -> None:
    if soft:
        without_locks(monkeypatch, NO_LOCKS[0])
    with Lock(tmp_path / "a.lock").take() as lock:
        before = lock.last_sign_of_life()
        assert before is not None
        for _ in range(3):
            with pytest.raises(Timeout):
                Lock(tmp_path / "a.lock").take()
        assert lock.last_sign_of_life() == before
    assert Lock(tmp_path / "missing").last_sign_of_life() is None


def test_a_soft_lock_of_this_process_is_the_librarys(tmp_path: Path) -> None:
    with SoftFileLock(tmp_path / "a.held.lock"), Lock(tmp_path / "a.lock").take() as lock:
        assert lock.is_held  # where the file system has locks, the marker means nothing
