"""Batches from reader processes: how they arrive, and what happens if one is killed, hangs, or finds no shared memory."""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from codegrid.data.threads import describe_hanging
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.waits import end_if_signalled, interruptible_wait

Batch = tuple[Tensor, Tensor]

SHARED_MEMORY = "/dev/shm"
BATCHES_PER_READER = 2  # that each reader prepares ahead, DataLoader's prefetch_factor
POLL_SECONDS = 1  # between two looks at the clock and the readers while a batch is awaited
NOTICE_SECONDS = 60  # after which a line says that training waits


@dataclass
class PipedBatch:
    """A batch that is sent through a pipe, as bytes."""

    arrays: tuple[NDArray[Any], NDArray[Any]]

    def unpack(self) -> Batch:
        values, labels = self.arrays
        return torch.from_numpy(values), torch.from_numpy(labels)


def pipe_batch(batch: Batch) -> Batch | PipedBatch:
    """Prepare a reader's batch for a pipe; a batch that was read by this process stays as it is."""
    if get_worker_info() is None:
        return batch
    values, labels = batch
    return PipedBatch((np.asarray(values), np.asarray(labels)))


def share_batch(batch: Batch) -> Batch | PipedBatch:
    """Move a reader's batch to shared memory, or prepare it for a pipe if there is no room for it.

    torch would move it in a thread, where an error is printed and the batch lost, and training would wait for ever.
    """
    if get_worker_info() is None:
        return batch
    try:
        for part in batch:
            part.share_memory_()
    except (RuntimeError, OSError):  # no room, or too many open files
        return pipe_batch(batch)
    return batch


def free_shared_memory() -> int | None:
    """Bytes that this machine's shared memory has room for; None if the system doesn't say."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # a system that has it elsewhere
        return None
    return status.f_bavail * status.f_frsize


def needed_shared_memory(num_workers: int, batch_bytes: int) -> int:
    """Bytes of shared memory that readers hold at most: what each prepares ahead, and two batches in use."""
    return (BATCHES_PER_READER * num_workers + 2) * batch_bytes


def find_reader_obstacle(num_workers: int) -> str | None:
    """Why this system can't start so many readers, which need semaphores, a few each; None if it can."""
    try:
        [multiprocessing.Lock() for _ in range(4 * num_workers + 16)]
    except OSError as error:  # no /dev/shm, or a full or read-only one
        return error.strerror or str(error)
    return None


class BatchLoader(DataLoader[Batch]):
    """A DataLoader whose waits end: when a reader has ended, after `patience` seconds, and by a signal (engine/waits.py).

    `patience` None is no limit. The first batch has none either if it `starts_late`: a stream reads up to where it was.
    """

    def __init__(
        self,
        samples: Any,
        *,
        patience: float | None = None,
        starts_late: bool = False,
        **settings: Any,
    ) -> None:
        settings["timeout"] = POLL_SECONDS if settings.get("num_workers") else 0
        super().__init__(samples, **settings)
        self.patience = patience
        self.starts_late = starts_late
        self.readers: list[BaseProcess] = []

    def __iter__(self) -> "BatchIterator":  # type: ignore[override]
        before = multiprocessing.active_children()
        try:
            batches = super().__iter__()
        except OSError as error:  # no memory, or no more processes for this user
            raise InputError(
                f"data.num_workers={self.num_workers} readers can't be started "
                f"({error.strerror or error}); use {fewer_readers(self.num_workers)}"
            ) from error
        started = [child for child in multiprocessing.active_children() if child not in before]
        self.readers = started or self.readers
        torchs_failures.take_over()
        return BatchIterator(batches, self)


class BatchIterator:
    """The batches of a `BatchLoader`."""

    def __init__(self, batches: Iterator[Any], loader: BatchLoader) -> None:
        self.batches = batches
        self.loader = loader
        self.limit = None if loader.starts_late else loader.patience  # of the first batch

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        try:
            with interruptible_wait():
                batch = self.wait_for_batch()
        except StopIteration:
            raise
        except BaseException:
            # They may hang, and the end of the program would wait for each of them.
            for reader in self.loader.readers:
                reader.kill()
            raise
        self.limit = self.loader.patience
        return batch.unpack() if isinstance(batch, PipedBatch) else batch

    def wait_for_batch(self) -> Batch | PipedBatch:
        """The next batch. Raises InputError if a reader has ended, or after the limit."""
        start = time.monotonic()
        notice = NOTICE_SECONDS
        while True:
            self.check_readers()
            try:
                with torchs_failures.raised(self.loader.readers):
                    batch: Batch | PipedBatch = next(self.batches)
                return batch
            except (RuntimeError, OSError, EOFError) as error:
                if not str(error).startswith("DataLoader timed out"):
                    self.explain(error)
                    raise
            end_if_signalled()
            waited = time.monotonic() - start
            if self.limit is not None and waited > self.limit:
                raise InputError(describe_hanging(self.limit))
            if waited > notice:
                log_line(
                    f"no image has been read for {waited:.0f} s; waiting for the disk or network"
                )
                notice *= 10

    def check_readers(self) -> None:
        """Raise InputError if a reader has ended: readers end with the program only."""
        for reader in self.loader.readers:
            if not reader.is_alive():
                raise InputError(describe_ended_reader(reader.exitcode, self.loader.num_workers))

    def explain(self, error: Exception) -> None:
        """Raise InputError with the sentence for an error that a reader's end or the system's limits cause; else return.

        A reader that has ended can't hand over the files of a batch in shared memory: that error is one of sockets.
        """
        if self.loader.readers:
            time.sleep(0.2)  # a process that ends is alive for a moment
        self.check_readers()
        text = str(error)
        if text.startswith("Too many open files") or "ancdata" in text:
            raise InputError(
                f"data.num_workers={self.loader.num_workers} readers need more open files than this system allows; "
                f"raise the limit with ulimit -n 65536, or use {fewer_readers(self.loader.num_workers)}"
            ) from error


def fewer_readers(n: int) -> str:
    """The setting for half as many readers."""
    return f"fewer, data.num_workers={n // 2}"


def describe_ended_reader(exit_code: int | None, num_workers: int) -> str:
    """What a reader's exit code says, and what to do."""
    way_out = f"use {fewer_readers(num_workers)}"
    if exit_code == -signal.SIGKILL:
        return (
            f"a reader of images (data.num_workers={num_workers}) was killed, as the system does when memory "
            f"runs out; {way_out}"
        )
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"a reader of images (data.num_workers={num_workers}) was ended by {name}; {way_out}"
    code = "" if exit_code is None else f" with code {exit_code}"
    return f"a reader of images (data.num_workers={num_workers}) has ended{code}; {way_out}"


class DeferredFailures:
    """Stands in for torch's handler of SIGCHLD, which raises when any loader's reader ends, wherever the program is.

    Within an update that could then not be saved, and in a finalizer it would be lost. This one raises while a batch is
    awaited, if a reader of that loader has ended: it may have left half a batch in a pipe, whose rest would never come.
    `BatchIterator` looks at the readers before each wait, and so also finds what is not raised.
    """

    def __init__(self) -> None:
        self.awaited: Sequence[BaseProcess] = ()

    def take_over(self) -> None:
        """Replace torch's handler, if it is set."""
        handler = signal.getsignal(signal.SIGCHLD)
        is_torchs = getattr(handler, "__module__", "").startswith("torch.utils.data")
        if is_torchs and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if is_in_finalizer(frame):
            return
        for reader in self.awaited:
            if not reader.is_alive():
                raise RuntimeError(f"DataLoader worker (pid {reader.pid}) has ended")

    @contextmanager
    def raised(self, readers: Sequence[BaseProcess]) -> Iterator[None]:
        """Inside, the end of one of these readers is raised."""
        self.awaited = readers
        try:
            yield
        finally:
            self.awaited = ()


def is_in_finalizer(frame: FrameType | None) -> bool:
    """Whether a frame belongs to a finalizer of multiprocessing or to __del__, where exceptions are printed and lost."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename == multiprocessing.util.__file__:
            return True
        frame = frame.f_back
    return False


torchs_failures = DeferredFailures()
