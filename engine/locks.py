"""Locks between processes, on any file system; no wait for one is endless."""

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError

POLL = 0.1  # seconds between two attempts to take a lock
SECONDS_UNTIL_NOTICE = 2.0  # a run that waits longer than this for another one says so
BEAT = 15.0  # seconds between two signs of life of a process that holds a lock
PATIENCE = 600.0  # seconds without a sign of life, after which the wait ends
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """A lock on a file, for `with lock.take():` or `with lock.wait(...):`.

    The system frees it when its process ends. Where a file system has no locks, as some network mounts, the existence of a
    second file is the lock; it is removed when its process has ended, or has shown no sign of life for `PATIENCE` seconds.
    A sign of life is a new time of the file, which a thread sets every `BEAT` seconds.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._lock: BaseFileLock = FileLock(self.file)
        self._released = threading.Event()

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock.is_locked

    @property
    def _held_file(self) -> Path:
        return Path(self._lock.lock_file)

    @property
    def is_soft(self) -> bool:
        """Whether the existence of a file is the lock."""
        return isinstance(self._lock, SoftFileLock)

    def last_sign_of_life(self) -> int | None:
        """The time (ns) of the file that the holder sets; None if the file is gone.

        Waiters truncate a lock's file, which changes its modification time, and read a file that stands for a lock, which
        changes its access time.
        """
        try:
            status = os.stat(self._held_file)
        except OSError:
            return None
        return status.st_mtime_ns if self.is_soft else status.st_atime_ns

    def take(self) -> "Lock":
        """Take the lock now. Raises filelock's Timeout if another process holds it, OSError if its file can't be written."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if not self._remove_abandoned():
                raise
            self._lock.acquire(timeout=0)
        except (OSError, NotImplementedError) as error:
            if self.is_soft or not lacks_locks(error):
                raise
            marker = self.file.with_name(f"{self.file.name.removesuffix('.lock')}.held.lock")
            self._lock = SoftFileLock(marker)
            return self.take()
        self._released = threading.Event()
        arguments = (self._held_file, self._released)
        show_life(self._held_file)
        threading.Thread(target=keep_showing_life, args=arguments, daemon=True).start()
        return self

    def wait(self, what: str, way_out: str) -> "Lock":
        """Take the lock, after waiting for another run that holds it and shows signs of life.

        `what` that run makes, and `way_out` is what the user can do instead of waiting. Raises InputError if it shows no
        sign of life for `PATIENCE` seconds, and OSError if the lock's file can't be written.
        """
        start = alive = time.monotonic()
        sign: int | None = None
        has_notice = False
        while True:
            with suppress(Timeout):
                return self.take()
            now = time.monotonic()
            if not has_notice and now - start >= SECONDS_UNTIL_NOTICE:
                has_notice = True
                log_line(f"{what} is being made by another run; waiting for it")
            if (latest := self.last_sign_of_life()) != sign:
                sign, alive = latest, now
            elif now - alive > PATIENCE:
                raise InputError(
                    f"{what} is being made by another run, which has shown no sign of life for "
                    f"{PATIENCE / 60:g} minutes: it is stopped, or hangs; end it, or {way_out}"
                )
            time.sleep(POLL)

    def release(self) -> None:
        self._released.set()
        self._lock.release()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _remove_abandoned(self) -> bool:
        """Remove the file that stands for a lock if its process, on another machine, shows no sign of life any more."""
        sign = self.last_sign_of_life()
        if not self.is_soft or sign is None or time.time() - sign / 1e9 < PATIENCE:
            return False
        self._held_file.unlink(missing_ok=True)
        return True


def lacks_locks(error: Exception) -> bool:
    """Whether an error says that a file system has no locks; an old filelock raises NotImplementedError instead."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in NO_LOCKS


def show_life(file: Path) -> None:
    """Set the times of a lock's file to now."""
    with suppress(OSError):  # a network disk that is away for a moment
        os.utime(file)


def keep_showing_life(file: Path, released: threading.Event) -> None:
    """Show life every `BEAT` seconds until the lock is released."""
    while not released.wait(BEAT):
        show_life(file)
