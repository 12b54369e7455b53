"""Cells of equal use: thresholds that are running quantiles, and codes that are running means."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.collectives import all_reduce, broadcast
from codegrid.engine.errors import check_range
from codegrid.evaluation.code_counts import count_uses

SAMPLES_PER_BIN = (
    4  # outputs in a bin on average, with which a batch moves thresholds at the full rate
)


class Quantiles(nn.Module):
    """The distribution of vectors, channel by channel, each given the digits of those before it (Rosenblatt 1952).

    A digit of channel c is the number of its thresholds that a vector exceeds. The thresholds depend on the digits before, and
    are the quantiles that leave all bins the same share, so all cells are used alike as far as no vectors are equal.
    The code of a cell is the mean of its vectors.

    decay    of thresholds and codes per update
    """

    codes: Tensor

    def __init__(self, levels: Sequence[int], decay: float) -> None:
        super().__init__()
        check_range("quantizer.decay", decay, 0, 1)
        self.levels = tuple(levels)
        self.decay = decay
        for c, level in enumerate(self.levels):
            nodes = math.prod(self.levels[:c])
            thresholds = torch.arange(1, level) * 2 / level - 1
            self.register_buffer(f"thresholds_{c}", thresholds.repeat(nodes, 1))
        self.register_buffer("codes", torch.zeros(math.prod(self.levels), len(self.levels)))
        self.codes.copy_(self.centres())

    def thresholds(self, channel: int) -> Tensor:
        """Those of a channel, (number of prefixes of digits, levels - 1), ascending."""
        thresholds: Tensor = getattr(self, f"thresholds_{channel}")
        return thresholds

    def indices(self, z: Tensor) -> Tensor:
        """Vectors (..., dim) -> indices of their cells (...), with the digit of the first channel lowest."""
        index = torch.zeros_like(z[..., 0], dtype=torch.int64)
        for c in range(len(self.levels)):
            index = self.refine(index, z, c)
        return index

    def refine(self, prefix: Tensor, z: Tensor, channel: int) -> Tensor:
        """Indices (...) by the digits of the channels before one -> those with its digit too."""
        thresholds = F.embedding(prefix, self.thresholds(channel))
        digit = (z[..., channel, None] > thresholds).sum(-1)
        return prefix + digit * math.prod(self.levels[:channel])

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Fit thresholds and codes to vectors (n, dim). Prefixes with fewer of them than bins have the thresholds of all."""
        prefix = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for c, level in enumerate(self.levels):
            of_all, _ = batch_quantiles(rows[:, c], torch.zeros_like(prefix), 1, level)
            nodes = len(self.thresholds(c))
            own, counts = batch_quantiles(rows[:, c], prefix, nodes, level)
            fitted = torch.where(counts[:, None] >= level, own, of_all)
            self.thresholds(c).copy_(broadcast(fitted))
            prefix = self.refine(prefix, rows, c)
        self.codes.copy_(self.centres())
        means, counts = cell_means(rows, prefix, self.codes)
        self.codes.lerp_(broadcast(means), broadcast(counts / (counts + 1))[:, None])

    @torch.no_grad()
    def follow(self, rows: Tensor, indices: Tensor) -> None:
        """Move thresholds and codes towards those of a batch of vectors (n, dim) in cells (n,)."""
        for c, level in enumerate(self.levels):
            nodes = len(self.thresholds(c))
            own, counts = batch_quantiles(rows[:, c], indices % nodes, nodes, level)
            of_ranks = all_reduce(own * counts[:, None])
            counts = all_reduce(counts)
            step = self.choose_step(counts, SAMPLES_PER_BIN * level)
            self.thresholds(c).lerp_(of_ranks / counts.clamp(min=1)[:, None], step[:, None])
        means, counts = cell_means(rows, indices, self.codes)
        self.codes.lerp_(means, self.choose_step(counts, SAMPLES_PER_BIN)[:, None])

    def choose_step(self, counts: Tensor, enough: float) -> Tensor:
        """How far values go towards those of a batch that has so many vectors of each: by 1 - decay for an average number, or for
        `enough` if that is more; not at all for none."""
        average = counts.mean().clamp(min=enough)
        return 1 - self.decay ** (counts / average)

    def centres(self) -> Tensor:
        """The middle of each cell (K, dim): of the outermost ones, as if they were as wide as their neighbours."""
        index = torch.arange(math.prod(self.levels), device=self.thresholds(0).device)
        columns = []
        for c, level in enumerate(self.levels):
            nodes = math.prod(self.levels[:c])
            t = self.thresholds(c)
            first, last = t[:, :1], t[:, -1:]
            width_low = t[:, 1:2] - first if level > 2 else torch.ones_like(first)
            width_high = last - t[:, -2:-1] if level > 2 else torch.ones_like(last)
            edges = torch.cat([first - width_low, t, last + width_high], 1)
            middles = (edges[:, 1:] + edges[:, :-1]) / 2
            columns.append(middles[index % nodes, index // nodes % level])
        return torch.stack(columns, 1)


def batch_quantiles(values: Tensor, groups: Tensor, n: int, level: int) -> tuple[Tensor, Tensor]:
    """values (N,) in groups (N,) of n -> the quantiles 1/level ... (level - 1)/level of each group (n, level - 1), and the number
    of its values (n,). A group without values has any numbers as quantiles."""
    order = values.argsort()
    order = order[groups[order].argsort(stable=True)]
    sizes = count_uses(groups, n)
    starts = sizes.cumsum(0) - sizes
    shares = torch.arange(1, level, device=values.device) / level
    upper = starts[:, None] + (shares * sizes[:, None]).long()
    lower = torch.maximum(upper - 1, starts[:, None])
    last = len(values) - 1
    in_order = values[order]
    quantiles = (in_order[upper.clamp(max=last)] + in_order[lower.clamp(max=last)]) / 2
    return quantiles, sizes.to(values.dtype)


def cell_means(rows: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of all ranks' vectors (n, dim) in each cell, or its code (K, dim) if there are none, and their number (K,)."""
    counts = all_reduce(count_uses(indices, len(codes)).to(codes))
    sums = all_reduce(torch.zeros_like(codes).index_add_(0, indices, rows))
    means = sums / counts.clamp(min=1)[:, None]
    return torch.where(counts[:, None] > 0, means, codes), counts
