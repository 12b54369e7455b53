"""How a codebook is used."""

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUse(Metric):
    """Counts every code over all batches and ranks: averages over batches would read too low a perplexity.

    Of the distribution p of codes: entropy -sum p log2 p in bits, perplexity 2^entropy (K where all are used alike),
    codes_used, the number of codes with a count.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, K: int) -> None:
        super().__init__()
        self.K = K
        self.add_state("counts", torch.zeros(K, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """indices: int64 of any shape, in [0, K)."""
        self.counts += torch.bincount(indices.flatten(), minlength=self.K)

    def compute(self) -> dict[str, Tensor]:
        p = self.counts.double() / self.counts.sum()
        entropy = -torch.xlogy(p, p).sum()
        return {
            "perplexity": entropy.exp().float(),
            "entropy_bits": (entropy / torch.log(torch.tensor(2.0))).float(),
            "codes_used": (self.counts > 0).sum().float(),
        }
