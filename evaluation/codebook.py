"""How a codebook is used."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from codegrid.evaluation.code_counts import count_uses


class CodebookUse(Metric):
    """Counts every code over all batches and ranks: a mean over batches would underestimate the perplexity.

    With p the distribution of a codebook's codes: entropy_bits is -sum p log2 p, perplexity is 2^entropy (K if all codes
    are equally frequent), codes_used is the number of codes that occur and usage its share of K. With several codebooks
    per position, entropy_bits is the sum of their entropies, perplexity is 2^(their mean), and codes_used and usage are
    those of the least used codebook.

    With `lengths`, indices are rows (..., L) of several parts, such as scales, with so many codes each, which are counted apart:
    entropy_bits is the mean over the codes of a row. A codebook that is `shared` by all parts is used by any of them.
    """

    full_state_update = False
    counts: Tensor

    def __init__(
        self,
        K: int,
        num_codebooks: int = 1,
        lengths: Sequence[int] = (),
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.K = K
        self.num_codebooks = num_codebooks
        self.lengths = list(lengths)
        self.shared = shared
        parts = len(self.lengths) or num_codebooks
        self.add_state("counts", torch.zeros(parts, K, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """indices: int64 of any shape, in [0, K); with several codebooks (..., num_codebooks)."""
        if self.lengths:
            rows = indices.reshape(-1, sum(self.lengths)).split(self.lengths, 1)
            columns = tuple(part.flatten() for part in rows)
        else:
            columns = indices.reshape(-1, self.num_codebooks).unbind(1)
        for counts, codes in zip(self.counts, columns, strict=True):
            counts += count_uses(codes, self.K)

    def total(self) -> Tensor:
        """The count of each code (num_codebooks, K), summed over all ranks; every rank must call it."""
        with self.sync_context():
            return self.counts.clone()

    def count_least(self) -> Tensor:
        """How many codes of the codebook that was counted least have been counted, on this rank."""
        of_parts = self.counts.sum(1)
        return of_parts.sum() if self.shared else of_parts.min()

    def compute(self) -> dict[str, Tensor]:
        entropies = self.entropies()
        is_used = self.counts > 0
        used = is_used.any(0).sum() if self.shared else is_used.sum(1).min()
        total = entropies.sum()
        if self.lengths:
            shares = entropies.new_tensor(self.lengths) / sum(self.lengths)
            total = (entropies * shares).sum()
        mean = total if self.lengths else entropies.mean()
        return {
            "perplexity": mean.exp().float(),
            "entropy_bits": (total / math.log(2)).float(),
            "codes_used": used.float(),
            "usage": used.float() / self.K,
        }

    def entropies(self) -> Tensor:
        """The entropy of the codes of each codebook, or of each part of a row, in nats, float64."""
        p = self.counts.double() / self.counts.sum(1, keepdim=True)
        return -torch.xlogy(p, p).sum(1)

    def count_perplexities(self) -> list[tuple[float, int]]:
        """The perplexity of each codebook, or of each part of a row, and how many codes were counted."""
        counts = self.counts.sum(1).tolist()
        return list(zip(self.entropies().exp().tolist(), counts, strict=True))
