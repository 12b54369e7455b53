"""Reader processes: how their batches arrive, and that no wait for one is endless."""

import errno
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codegrid.data import readers
from codegrid.data.loading import BatchDataModule
from codegrid.data.samples import ArraySamples
from codegrid.engine.errors import InputError

GIB = 2**30


class Numbers(BatchDataModule):
    """Twelve samples whose values and labels are their indices, in batches of four."""

    def load_samples(self, split: str) -> Any:
        return ArraySamples(np.arange(12, dtype=np.uint8)[:, None], np.arange(12))


class Samples:
    """Eight samples; reading the third batch of two does something else."""

    shard_sizes = None
    starts_late = False
    sample_bytes = 9

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 8

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        if 4 in indices:
            self.act()
        return torch.tensor(indices)[:, None], torch.tensor(indices)


class Acting(BatchDataModule):
    def __init__(
        self, act: Callable[[], Any], timeout: float = 0, starts_late: bool = False
    ) -> None:
        super().__init__(2, 1, 0, timeout)
        self.act = act
        self.starts_late = starts_late

    def load_samples(self, split: str) -> Any:
        samples = Samples(self.act)
        samples.starts_late = self.starts_late
        return samples


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look often, and leave SIGCHLD's handler as it was."""
    monkeypatch.setattr(readers, "POLL_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def hang() -> None:
    time.sleep(600)


def labels(data: BatchDataModule) -> list[int]:
    return torch.cat([label for _, label in data.val_dataloader()]).tolist()


def await_third(data: BatchDataModule) -> Any:
    """The loader after its third batch was awaited."""
    loader = data.val_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    next(batches)
    return loader


def test_batches_come_through_pipes_if_shared_memory_is_too_small_and_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = labels(Numbers(4, 2, 0))
    monkeypatch.setattr("codegrid.data.loading.free_shared_memory", lambda: 100)
    data = Numbers(4, 2, 0)
    assert labels(data) == labels(data) == shared == list(range(12))
    printed = capsys.readouterr().err
    assert printed.count("shared memory (/dev/shm) has 0 MiB free, and data.num_workers=2") == 1
    assert "come through pipes" in printed


@pytest.mark.parametrize("error", [RuntimeError("no space left"), OSError(errno.EMFILE, "files")])
def test_a_batch_that_shared_memory_refuses_comes_through_a_pipe(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Tensor) -> Tensor:
        if self.dtype == torch.int64:  # the labels, after the values are shared
            raise error
        return self

    monkeypatch.setattr(Tensor, "share_memory_", refuse)
    batches = list(Numbers(4, 1, 0).val_dataloader())
    assert [values.flatten().tolist() for values, _ in batches] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11],
    ]  # fmt: skip
    assert batches[0][0].dtype == torch.uint8


def test_what_readers_hold_is_what_they_prepare_and_what_is_in_use() -> None:
    batch = 128 * 3 * 256 * 256
    assert readers.needed_shared_memory(8, batch) == 18 * batch
    assert (
        readers.needed_shared_memory(4, batch) < 0.3 * GIB < readers.needed_shared_memory(12, batch)
    )


def test_enough_shared_memory_or_an_unknown_amount_is_used_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for free in (GIB, None):
        monkeypatch.setattr("codegrid.data.loading.free_shared_memory", lambda free=free: free)
        loader = Numbers(4, 2, 0).val_dataloader()
        assert loader.collate_fn is readers.share_batch
    monkeypatch.setattr(readers, "SHARED_MEMORY", "/nowhere")
    assert readers.free_shared_memory() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOSYS, errno.EACCES])
def test_a_system_without_semaphores_reads_in_the_training_process(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("multiprocessing.Lock", refuse)
    data = Numbers(4, 3, 0)
    assert labels(data) == list(range(12))
    printed = capsys.readouterr().err
    assert "data.num_workers=3 readers can't be started" in printed
    assert "this process reads the images itself" in printed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's __del__
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_readers_that_can_not_be_started_are_a_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(
        InputError, match=r"data.num_workers=2 readers can't be started .*num_workers=1"
    ):
        iter(Numbers(4, 2, 0).val_dataloader())


# torch counts the free files by opening ten, and SIGCHLD's exception may leave that half done.
@pytest.mark.filterwarnings("ignore:unclosed file <_io:ResourceWarning")
@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed, as the system does when memory runs out; use fewer"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was ended by SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "was ended by SIGBUS"),
        (lambda: os._exit(3), "has ended with code 3"),
    ],
)  # fmt: skip
def test_a_reader_that_ends_is_one_sentence_that_names_num_workers(
    act: Callable[[], Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as refusal:
        await_third(Acting(act))
    assert "data.num_workers=1" in str(refusal.value)
    assert "data.num_workers=0" in str(refusal.value)
    del refusal
    gc.collect()  # or another test would be blamed for those files


def test_a_readers_own_error_passes_as_it_is() -> None:
    def fail() -> None:
        raise InputError("photos/7.png can't be read")

    with pytest.raises(InputError, match=r"photos/7.png can't be read"):
        await_third(Acting(fail))


def test_a_wait_for_a_reader_that_hangs_ends_with_the_setting_and_the_reader() -> None:
    data = Acting(hang, timeout=0.3)
    loader = data.val_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    start = time.monotonic()
    with pytest.raises(
        InputError,
        match=r"no image has been read for 0.3 s .data.reader_timeout.*or 0 for no limit",
    ):
        next(batches)
    assert time.monotonic() - start < 3
    [reader] = loader.readers
    reader.join(3)
    assert not reader.is_alive()


def test_the_first_batch_of_a_stream_may_take_longer() -> None:
    def late() -> None:
        time.sleep(0.5)

    data = Acting(late, timeout=0.2, starts_late=True)
    first = data.iterate_chunks("val", 2, [2, 0])  # the chunk that is late comes first
    assert next(iter(first))[1].tolist() == [4, 5]
    with pytest.raises(InputError, match="no image has been read"):
        await_third(data)


def test_a_long_wait_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "NOTICE_SECONDS", 0.2)
    await_third(Acting(lambda: time.sleep(0.5)))
    assert capsys.readouterr().err.count("no image has been read for 0 s; waiting") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_ends_the_wait_for_a_batch_and_the_readers(workers: int) -> None:
    data = Acting(hang)
    data.num_workers = workers
    loader = data.val_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert time.monotonic() - start < 3
    for reader in loader.readers:
        reader.join(3)
        assert not reader.is_alive()


def test_a_reader_that_is_killed_during_an_update_is_reported_at_the_next_wait() -> None:
    loader = Numbers(4, 1, 0).train_dataloader()
    batches = iter(loader)
    next(batches)
    [reader] = loader.readers
    reader.kill()
    reader.join(3)
    time.sleep(0.1)  # torch's handler of SIGCHLD would raise here, in the middle of an update
    with pytest.raises(InputError, match="was killed, as the system does when memory runs out"):
        next(batches)


def test_a_batch_that_is_cut_off_in_its_pipe_does_not_block_the_next_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Large(Numbers):
        def load_samples(self, split: str) -> Any:
            return ArraySamples(np.zeros((12, 2**20), np.uint8), np.arange(12))

    monkeypatch.setattr("codegrid.data.loading.free_shared_memory", lambda: 100)
    loader = Large(4, 1, 0).train_dataloader()
    batches = iter(loader)
    next(batches)
    time.sleep(0.2)  # the reader writes the next one, of which the pipe takes a part
    loader.readers[0].kill()
    loader.readers[0].join(3)
    with pytest.raises(InputError, match="was killed"):
        next(batches), next(batches)


@pytest.mark.parametrize("value", [-1, "soon", True, float("nan")])
def test_a_time_limit_is_a_number_of_seconds(value: Any) -> None:
    with pytest.raises(
        InputError, match=f"data.reader_timeout={value} must be a number at least 0"
    ):
        BatchDataModule.__init__(Numbers(4, 0, 0), 4, 0, 0, value)
