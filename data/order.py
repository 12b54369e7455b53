"""The order of training batches: endless, and a function of the seed and the batch's number."""

from collections.abc import Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from codegrid.engine.errors import InputError


class BatchOrder(Sampler[list[int]]):
    """Endless batches of sample indices. Batch i depends on (seed, i) only, so a resumed run starts at its own i.

    Each epoch is a new permutation of the n samples. Samples that do not fill a batch on every rank are dropped at the
    end of the epoch. If `shard_sizes` lists how many samples each shard holds, an epoch visits the shards in a new order
    and mixes the samples of `OPEN_SHARDS` of them at a time, opening the next shard where one ends. The last shards wrap
    around to the beginning of the epoch, so that all parts of an epoch are mixed equally well.

    Raises InputError if n samples do not fill one batch on each of `world_size` ranks; `setting` is what the user changes then.
    """

    OPEN_SHARDS = 16  # shards that are read from at the same time

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shard_sizes: list[int] | None = None,
        setting: str = "data.batch_size",
    ) -> None:
        if n < batch_size * world_size:
            most = n // world_size
            raise InputError(
                f"{n} training samples don't fill one batch of {batch_size * world_size}; "
                + (f"use {setting}={most}, or less" if most else f"{world_size} devices need more")
            )
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.shard_sizes = shard_sizes

    def permute_epoch(self, epoch: int) -> NDArray[np.int64]:
        """The permutation (n,) of the samples in this epoch."""
        generator = np.random.default_rng((self.seed, epoch))
        if self.shard_sizes is None:
            return generator.permutation(self.n)
        num_shards = len(self.shard_sizes)
        # The time in [0, num_shards) at which the shard of each sample is opened.
        opened_at = np.repeat(generator.permutation(num_shards), self.shard_sizes)
        delay = min(self.OPEN_SHARDS, num_shards) * generator.random(self.n)
        return np.argsort((opened_at + delay) % num_shards)

    def __iter__(self) -> Iterator[list[int]]:
        batches_per_epoch = self.n // (self.batch_size * self.world_size)
        current = -1
        for i in count(self.start):
            epoch, batch = divmod(i, batches_per_epoch)
            if epoch != current:
                order, current = self.permute_epoch(epoch), epoch
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()
