"""How a codebook is used."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUse(Metric):
    """Counts every code over all batches and ranks: averages over batches would read too low a perplexity.

    Of the distribution p of a codebook's codes: entropy -sum p log2 p in bits, perplexity 2^entropy (K where all are used
    alike), codes_used, the number of codes with a count, usage, its share of K. Of several codebooks a position, entropy
    is the sum of theirs, perplexity 2^(their mean), and codes_used and usage are of the one that uses fewest.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, K: int, num_codebooks: int = 1) -> None:
        super().__init__()
        self.K, self.num_codebooks = K, num_codebooks
        self.add_state(
            "counts", torch.zeros(num_codebooks, K, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, indices: Tensor) -> None:
        """indices: int64 of any shape, in [0, K); of several codebooks (..., num_codebooks)."""
        for counts, book in zip(
            self.counts, indices.reshape(-1, self.num_codebooks).unbind(1), strict=True
        ):
            counts += torch.bincount(book, minlength=self.K)

    def total(self) -> Tensor:
        """How often each code was counted (num_codebooks, K), on all ranks together; each of them must ask."""
        with self.sync_context():
            return self.counts.clone()

    def compute(self) -> dict[str, Tensor]:
        p = self.counts.double() / self.counts.sum(1, keepdim=True)
        entropies = -torch.xlogy(p, p).sum(1)
        used = (self.counts > 0).sum(1).min()
        return {
            "perplexity": entropies.mean().exp().float(),
            "entropy_bits": (entropies.sum() / math.log(2)).float(),
            "codes_used": used.float(),
            "usage": used.float() / self.K,
        }
