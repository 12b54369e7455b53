"""Endless shuffled batches that can start anywhere, and the datamodule that both stages build on."""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from engine.errors import InputError


class BatchOrder(Sampler[list[int]]):
    """Batch i of a run is a function of (seed, i) alone: a resumed run starts at its own i and misses nothing.

    Every epoch is a new permutation; what does not fill a batch on every rank waits for the next epoch. Where images lie
    in `shards`, an epoch goes through them in a new order and mixes the images of `OPEN` at a time; where one ends the
    next begins. The last ones reach over into the beginning, so that no part of an epoch is mixed less than others.
    """

    OPEN = 16  # shards that are read from at once

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        shards: list[int] | None = None,
    ) -> None:
        if n < batch_size * world:
            raise InputError(
                f"{n} training samples don't fill one batch of {batch_size * world}; use a smaller data.batch_size"
            )
        self.n, self.batch_size, self.seed, self.start, self.rank, self.world = (
            n,
            batch_size,
            seed,
            start,
            rank,
            world,
        )
        self.shards = shards

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation (n,) that an epoch shows."""
        stream = np.random.default_rng((self.seed, epoch))
        if self.shards is None:
            return stream.permutation(self.n)
        n = len(self.shards)
        begins = np.repeat(
            stream.permutation(n), self.shards
        )  # the moment, 0 to n, at which an image's shard is opened
        return np.argsort((begins + min(self.OPEN, n) * stream.random(self.n)) % n)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, shown = self.n // (self.batch_size * self.world), -1
        for i in count(self.start):
            epoch, batch = divmod(i, per_epoch)
            if epoch != shown:
                order, shown = self.order(epoch), epoch
            first = (batch * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


@dataclass
class MappedArray:
    """A .npy file that is opened as a memory map, not read."""

    file: str


class ArraySamples(Dataset[tuple[Tensor, Tensor]]):
    """`values` (n, ...) and `labels` (n,), fetched a whole batch at a time; of `rows` only, where some are given."""

    shards: list[int] | None = None

    def __init__(
        self, values: NDArray[Any], labels: NDArray[Any], rows: NDArray[np.int64] | None = None
    ) -> None:
        self.values, self.labels, self.rows = values, labels, rows

    def __getstate__(self) -> dict[str, Any]:
        """A memory map goes to a reading process by its file's name: by value it would be copied whole."""
        return {
            name: MappedArray(str(value.filename)) if isinstance(value, np.memmap) else value
            for name, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {
            name: np.load(v.file, mmap_mode="r") if isinstance(v, MappedArray) else v
            for name, v in state.items()
        }
        self.__dict__.update(opened)

    def __len__(self) -> int:
        return len(self.values if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        values, labels = self.__getitems__([index])
        return values[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        values = self.values[rows]
        if (
            values.dtype.kind == "u" and values.dtype != np.uint8
        ):  # torch can't index an embedding with these
            values = values.astype(np.int32 if values.dtype == np.uint16 else np.int64)
        return torch.from_numpy(values), torch.from_numpy(self.labels[rows].astype(np.int64))


def count_cores() -> int:
    """Processors that this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _patient(_: int) -> None:
    """A signal to all processes of a run is for the first one: it ends its readers when it needs them no more. Two SIGTERMs are
    meant for the reader."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _whole(batch: Any) -> Any:
    return batch


class BatchDataModule(L.LightningDataModule, ABC):
    """Subclasses say what a split holds (`load`); this one shuffles, batches, shards over ranks and resumes.

    Training batches never end, so a run is counted in steps; validation runs once over its split, nothing dropped.
    """

    batches = BatchOrder  # the order of training

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"data.batch_size={batch_size} must be at least 1, a whole number")
        if not isinstance(num_workers, int) or num_workers < 0:
            raise InputError(
                f"data.num_workers={num_workers} must be a whole number of at least 0 processes"
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._splits: dict[str, Any] = {}

    @abstractmethod
    def load(self, split: str) -> Any:
        """The samples of "train" or "val": Samples, or what else has a length, `__getitems__` and `shards`."""

    def split(self, name: str) -> Any:
        """The samples of "train" or "val", loaded once."""
        if name not in self._splits:
            self._splits[name] = self.load(name)
        return self._splits[name]

    def prepare_data(self) -> None:
        self.split("train")
        self.split("val")

    @property
    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(
        self, split: str, batches: Sampler[list[int]] | list[list[int]]
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            self.split(split),
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_whole,
            worker_init_fn=_patient,
            generator=torch.Generator().manual_seed(
                self.seed
            ),  # or the loader would draw from the model's stream
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        rank, world = self._ranks
        # A module counts its own steps and restores the count before the loader is asked for: a batch a step.
        done = getattr(self.trainer.lightning_module, "step", 0) if self.trainer else 0
        samples = self.split("train")
        return self._loader(
            "train",
            self.batches(
                len(samples), self.batch_size, self.seed, done, rank, world, samples.shards
            ),
        )

    def enough(self, world: int) -> None:
        """Raise InputError where the training samples don't fill a batch on each of so many ranks."""
        self.batches(self.size("train"), self.batch_size, self.seed, world=world)

    def shuffled(self, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Endless training batches of another size and order than those of this run's training."""
        samples = self.split("train")
        return self._loader(
            "train", self.batches(len(samples), batch_size, seed, shards=samples.shards)
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.once("val")

    def once(self, split: str) -> DataLoader[tuple[Tensor, Tensor]]:
        """One pass over a split in its own order, this rank's share."""
        rank, world = self._ranks
        mine = list(range(rank, self.size(split), world))
        return self._loader(
            split, [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        )

    def pieces(
        self, split: str, size: int, which: Sequence[int]
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """For each p of `which` the samples [p * size, (p + 1) * size) of a split, in its own order."""
        n = self.size(split)
        return self._loader(split, [list(range(p * size, min(p * size + size, n))) for p in which])

    def size(self, split: str) -> int:
        """How many samples a split has."""
        return len(self.split(split))

    def some(self, split: str, n: int) -> tuple[Tensor, Tensor]:
        """n samples, or all where there are fewer, from all over a split; of shards those that training would show first."""
        samples = self.split(split)
        n = min(n, len(samples))
        if samples.shards is not None:  # to open them all may take hours
            return samples.__getitems__(
                next(iter(self.batches(len(samples), n, self.seed, shards=samples.shards)))
            )
        return samples.__getitems__(np.linspace(0, len(samples) - 1, n).astype(int).tolist())
