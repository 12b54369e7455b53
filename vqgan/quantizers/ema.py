"""A codebook of running means."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.distributed import all_reduce
from vqgan.quantizers.codebook import Codebook


class EMA(Codebook):
    """Nearest neighbour in a codebook of running means (van den Oord et al. 2017, eq. 1-3 and appendix A.1).

    Each code is sums / counts, running over the encoder outputs assigned to it. Counts start at 1: from 0, the first
    step would divide the codes that nobody chose by almost nothing.
    """

    codebook: Tensor
    sums: Tensor

    def __init__(self, K: int, dim: int = 64, **switches: Any) -> None:
        super().__init__(K, dim, **switches)
        self.register_buffer("codebook", self.unit(torch.randn(K, dim)))
        self.register_buffer("sums", self.codebook.clone())

    def codes(self) -> Tensor:
        return self.codebook

    def unit(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=1) if self.cosine else codes

    def follow(self, z: Tensor, indices: Tensor, share: Tensor) -> None:
        sums = all_reduce(torch.zeros_like(self.sums).index_add_(0, indices, z))
        self.sums.lerp_(sums * share, 1 - self.decay)
        self.codebook.copy_(self.unit(self.sums / self.counts[:, None]))

    def place(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        codes = self.unit(codes)
        self.codebook[rows], self.counts[rows], self.sums[rows] = (
            codes,
            counts,
            codes * counts[:, None],
        )
