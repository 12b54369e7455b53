"""The datamodule that both stages build on: shuffled batches for every rank, resumable at any step."""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data.order import BatchOrder
from engine.errors import InputError


def count_cores() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_group_signals(_: int) -> None:
    """Let worker processes ignore signals that are sent to the whole process group.

    The main process handles these and stops its workers when it no longer needs them. A worker dies of a second SIGTERM,
    since two of them are meant for the worker itself.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _keep_batch(batch: Any) -> Any:
    return batch


class BatchDataModule(L.LightningDataModule, ABC):
    """Shuffles, batches, distributes over ranks and resumes. Subclasses say what a split holds (`load_samples`).

    Training batches never end, so a run is counted in steps. Validation is one pass over its split that drops nothing.
    """

    batch_order: type[BatchOrder] = BatchOrder  # the order of training batches
    group = "data."  # what the settings' names begin with in the stage that trains on these batches

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(
                f"{self.group}batch_size={batch_size} must be at least 1, a whole number"
            )
        if not isinstance(num_workers, int) or num_workers < 0:
            raise InputError(
                f"{self.group}num_workers={num_workers} must be a whole number of at least 0 processes"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._samples: dict[str, Any] = {}

    @abstractmethod
    def load_samples(self, split: str) -> Any:
        """The samples of "train" or "val": ArraySamples, or anything with a length, `__getitems__` and `shard_sizes`."""

    def samples(self, split: str) -> Any:
        """The samples of "train" or "val", loaded on first use."""
        if split not in self._samples:
            self._samples[split] = self.load_samples(split)
        return self._samples[split]

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
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """A loader of these batches of sample indices of a split."""
        return DataLoader(
            self.samples(split),
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_keep_batch,
            worker_init_fn=_ignore_group_signals,
            # Without a generator the loader would draw its seed from the model's random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
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

    def check_batch_fits(self, world_size: int) -> None:
        """Raise InputError if the training samples do not fill one batch on each of `world_size` ranks."""
        self.batch_order(
            self.size("train"),
            self.batch_size,
            self.seed,
            world_size=world_size,
            setting=self.batch_setting,
        )

    def shuffled_loader(self, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Endless training batches with a batch size and seed of their own, independent of this run's training."""
        samples = self.samples("train")
        order = self.batch_order(len(samples), batch_size, seed, shard_sizes=samples.shard_sizes)
        return self.make_loader("train", order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.iterate_split("val")

    def iterate_split(self, split: str) -> DataLoader[tuple[Tensor, Tensor]]:
        """One pass over this rank's share of a split, in the split's own order."""
        rank, world_size = self._rank_and_world_size
        share = list(range(rank, self.size(split), world_size))
        starts = range(0, len(share), self.batch_size)
        return self.make_loader(split, [share[i : i + self.batch_size] for i in starts])

    def iterate_chunks(
        self, split: str, chunk_size: int, chunks: Sequence[int]
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """For each c of `chunks` the samples [c * chunk_size, (c + 1) * chunk_size) of a split, in its own order."""
        n = self.size(split)
        starts = [chunk * chunk_size for chunk in chunks]
        return self.make_loader(
            split, [list(range(start, min(start + chunk_size, n))) for start in starts]
        )

    def size(self, split: str) -> int:
        """The number of samples of a split."""
        return len(self.samples(split))

    def take_evenly(self, split: str, n: int) -> tuple[Tensor, Tensor]:
        """n samples spread evenly over a split, or all of them if there are fewer.

        If the samples lie in shards, these are the samples that training would show first, since it may take hours to open
        all shards.
        """
        samples = self.samples(split)
        n = min(n, len(samples))
        if samples.shard_sizes is not None:
            order = self.batch_order(len(samples), n, self.seed, shard_sizes=samples.shard_sizes)
            return samples.__getitems__(next(iter(order)))
        return samples.__getitems__(np.linspace(0, len(samples) - 1, n).astype(int).tolist())
