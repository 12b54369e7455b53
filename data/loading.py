"""Endless shuffled batches that can start anywhere, and the datamodule that both stages build on."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.errors import InputError


class Batches(Sampler[list[int]]):
    """Batch i of a run is a function of (seed, i) alone: a resumed run starts at its own i and misses nothing.

    Every epoch is a new permutation; what does not fill a batch on every rank waits for the next epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if n < batch_size * world:
            raise InputError(f"{n} training samples don't fill one batch of {batch_size * world}; use a smaller data.batch_size")
        self.n, self.batch_size, self.seed, self.start, self.rank, self.world = n, batch_size, seed, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, shown = self.n // (self.batch_size * self.world), -1
        for i in count(self.start):
            epoch, batch = divmod(i, per_epoch)
            if epoch != shown:
                order, shown = np.random.default_rng((self.seed, epoch)).permutation(self.n), epoch
            first = (batch * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """`values` (n, ...) and `labels` (n,), fetched a whole batch at a time."""

    def __init__(self, values: NDArray[Any], labels: NDArray[Any]) -> None:
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        values, labels = self.__getitems__([index])
        return values[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        values = self.values[np.asarray(indices)]
        if values.dtype == np.uint16:  # torch can neither index an embedding nor compare with uint16
            values = values.astype(np.int32)
        return torch.from_numpy(values), torch.from_numpy(self.labels[np.asarray(indices)].astype(np.int64))


def _whole(batch: Any) -> Any:
    return batch


class BatchDataModule(L.LightningDataModule):
    """Subclasses say what a split holds (`load`); this one shuffles, batches, shards over ranks and resumes.

    Training batches never end, so a run is counted in steps; validation runs once over its split, nothing dropped.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"data.batch_size={batch_size} must be at least 1")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._splits: dict[str, Samples] = {}

    def load(self, split: str) -> Samples:
        """The samples of "train" or "val"."""
        raise NotImplementedError

    def split(self, name: str) -> Samples:
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

    def _loader(self, split: str, batches: Sampler[list[int]] | list[list[int]]) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            self.split(split),
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_whole,
            generator=torch.Generator().manual_seed(self.seed),  # or the loader would draw from the model's stream
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        rank, world = self._ranks
        # A module counts its own steps and restores the count before the loader is asked for: a batch a step.
        done = getattr(self.trainer.lightning_module, "step", 0) if self.trainer else 0
        return self._loader("train", Batches(len(self.split("train")), self.batch_size, self.seed, done, rank, world))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.once("val")

    def once(self, split: str) -> DataLoader[tuple[Tensor, Tensor]]:
        """One pass over a split in its own order, this rank's share."""
        rank, world = self._ranks
        mine = list(range(len(self.split(split))))[rank::world]
        return self._loader(split, [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)])
