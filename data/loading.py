"""The datamodule that both stages build on: shuffled batches for every rank, resumable at any step."""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from codegrid.data.order import BatchOrder
from codegrid.data.readers import (
    BATCHES_PER_READER,
    Batch,
    BatchLoader,
    find_reader_obstacle,
    free_shared_memory,
    needed_shared_memory,
    pipe_batch,
    share_batch,
)
from codegrid.data.transfer import CopyStream
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_range


def count_cores() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_group_signals(_: int) -> None:
    """Let worker processes ignore signals that are sent to the whole process group.

    The main process handles these and stops its workers when it no longer needs them. A worker dies of a second SIGTERM,
    since two of them are meant for the worker itself.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class BatchDataModule(L.LightningDataModule, ABC):
    """Shuffles, batches, distributes over ranks and resumes. Subclasses say what a split holds (`load_samples`).

    Training batches never end, so a run is counted in steps. Validation is one pass over its split that drops nothing.
    """

    batch_order: type[BatchOrder] = BatchOrder  # the order of training batches
    group = "data."  # what the settings' names begin with in the stage that trains on these batches

    def __init__(
        self, batch_size: int, num_workers: int, seed: int, reader_timeout: float = 0
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(
                f"{self.group}batch_size={batch_size} must be at least 1, a whole number"
            )
        if not isinstance(num_workers, int) or num_workers < 0:
            raise InputError(
                f"{self.group}num_workers={num_workers} must be a whole number of at least 0 processes"
            )
        check_range("data.reader_timeout", reader_timeout, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.patience = reader_timeout or None  # seconds, None for no limit
        self._samples: dict[str, Any] = {}
        self._reported: set[str] = set()
        self._copy_stream: CopyStream | None = None

    @abstractmethod
    def load_samples(self, split: str) -> Any:
        """The samples of "train" or "val": ArraySamples, LiveSamples, or what has their length, methods and attributes."""

    def samples(self, split: str) -> Any:
        """The samples of "train" or "val", loaded on first use."""
        if split not in self._samples:
            self._samples[split] = self.load_samples(split)
        return self._samples[split]

    @property
    def loaded_splits(self) -> list[str]:
        """The splits whose samples are loaded."""
        return list(self._samples)

    def prepare_data(self) -> None:
        self.samples("train")
        self.samples("val")

    @property
    def batch_setting(self) -> str:
        """The name of the setting that gives the batch size."""
        return f"{self.group}batch_size"

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def make_loader(
        self, split: str, batches: Sampler[list[int]] | list[list[int]]
    ) -> DataLoader[Batch]:
        """A loader of these batches of sample indices of a split."""
        samples = self.samples(split)
        sizes = map(len, batches) if isinstance(batches, list) else [self.batch_size]
        num_workers = self._count_readers()
        uses_pipes = num_workers > 0 and self._lacks_shared_memory(
            num_workers, max(sizes, default=0) * samples.sample_bytes
        )
        return BatchLoader(
            samples,
            batch_sampler=batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=BATCHES_PER_READER if num_workers else None,
            # A reader that is killed while it writes to a pipe would leave the thread that pins waiting for the rest.
            pin_memory=torch.cuda.is_available() and not uses_pipes,
            collate_fn=pipe_batch if uses_pipes else share_batch,
            worker_init_fn=ignore_group_signals,
            # Without a generator the loader would draw its seed from the model's random numbers.
            generator=torch.Generator().manual_seed(self.seed),
            patience=self.patience,
            starts_late=samples.starts_late,
        )

    def _count_readers(self) -> int:
        """`num_workers`, or 0, which is reported, if this system can't start processes that read."""
        if self.num_workers and (obstacle := find_reader_obstacle(self.num_workers)):
            self._report(
                f"data.num_workers={self.num_workers} readers can't be started, since this system has no semaphores "
                f"({obstacle}); this process reads the images itself"
            )
            return 0
        return self.num_workers

    def _lacks_shared_memory(self, num_workers: int, batch_bytes: int) -> bool:
        """Whether shared memory has no room for what the readers will hold, which is reported."""
        free = free_shared_memory()
        needed = needed_shared_memory(num_workers, batch_bytes)
        if free is None or needed <= free:
            return False
        self._report(
            f"shared memory (/dev/shm) has {free / 2**20:,.0f} MiB free, and data.num_workers={num_workers} readers "
            f"hold up to {needed / 2**20:,.0f} MiB of batches: they come through pipes, which is a little slower; "
            "docker run --shm-size=8g gives a container more"
        )
        return True

    def _report(self, sentence: str) -> None:
        """Print a sentence about the readers once; training and validation have a loader each."""
        if sentence.partition(",")[0] not in self._reported:
            self._reported.add(sentence.partition(",")[0])
            log_line(sentence)

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world_size
        # A module counts its own steps, one batch each, and restores the count before Lightning asks for the loader.
        done = getattr(self.trainer.lightning_module, "step", 0) if self.trainer else 0
        samples = self.samples("train")
        order = self.batch_order(
            len(samples),
            self.batch_size,
            self.seed,
            done,
            rank,
            world_size,
            samples.shard_sizes,
            self.batch_setting,
        )
        return self.make_loader("train", order)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """The batch on the device; a GPU copies it while it computes the update before."""
        to_device = partial(
            super().transfer_batch_to_device, device=device, dataloader_idx=dataloader_idx
        )
        if device.type != "cuda":
            return to_device(batch)
        if self._copy_stream is None or self._copy_stream.device != device:
            self._copy_stream = CopyStream(device)
        return self._copy_stream.copy(batch, to_device)

    def check_batch_fits(self, world_size: int, n: int | None = None) -> None:
        """Raise InputError if the training samples do not fill one batch on each of `world_size` ranks.

        `n` is their number, for a caller who has it without loading them.
        """
        self.batch_order(
            self.size("train") if n is None else n,
            self.batch_size,
            self.seed,
            world_size=world_size,
            setting=self.batch_setting,
        )

    def shuffled_loader(self, batch_size: int, seed: int) -> DataLoader[Batch]:
        """Endless training batches with a batch size and seed of their own, independent of this run's training."""
        samples = self.samples("train")
        order = self.batch_order(len(samples), batch_size, seed, shard_sizes=samples.shard_sizes)
        return self.make_loader("train", order)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.iterate_split("val")

    def iterate_split(self, split: str) -> DataLoader[Batch]:
        """One pass over this rank's share of a split, in the split's own order."""
        rank, world_size = self._rank_and_world_size
        share = list(range(rank, self.size(split), world_size))
        starts = range(0, len(share), self.batch_size)
        return self.make_loader(split, [share[i : i + self.batch_size] for i in starts])

    def iterate_chunks(
        self, split: str, chunk_size: int, chunks: Sequence[int]
    ) -> DataLoader[Batch]:
        """For each c of `chunks` the samples [c * chunk_size, (c + 1) * chunk_size) of a split, in its own order."""
        n = self.size(split)
        starts = [chunk * chunk_size for chunk in chunks]
        return self.make_loader(
            split, [list(range(start, min(start + chunk_size, n))) for start in starts]
        )

    def read_first(self, n: int) -> Batch:
        """A batch as the training step gets it, of the first n training samples, repeated if there are fewer. Nothing is
        written."""
        samples = self.samples("train")
        return samples.__getitems__([i % len(samples) for i in range(n)])

    def size(self, split: str) -> int:
        """The number of samples of a split."""
        return len(self.samples(split))

    def take_evenly(self, split: str, n: int) -> tuple[Tensor, Tensor]:
        """n samples spread evenly over a split, or all of them if there are fewer.

        If the samples lie in shards, these are the samples that training would show first, since it may take hours to open
        all shards.
        """
        return self.samples(split).__getitems__(self.spread_evenly(split, n, self.seed))

    def spread_evenly(self, split: str, n: int, seed: int) -> list[int]:
        """The indices of the samples that take_evenly takes; the seed decides on those in shards."""
        samples = self.samples(split)
        n = min(n, len(samples))
        if samples.shard_sizes is not None:
            return next(
                iter(self.batch_order(len(samples), n, seed, shard_sizes=samples.shard_sizes))
            )
        return np.linspace(0, len(samples) - 1, n).astype(int).tolist()
