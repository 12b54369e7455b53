"""A codebook learned by gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan.quantizers.codebook import Codebook


class VQ(Codebook):
    """Nearest neighbour in a learned codebook (van den Oord et al. 2017, eq. 1-3).

    The loss is |sg(z_e) - e|^2 + beta |z_e - sg(e)|^2, means over all elements: beta is the weight of the second term,
    the commitment of the encoder. (Implementations that put it on the first commit four times as much.)
    """

    def __init__(self, K: int, dim: int = 64, **switches: Any) -> None:
        super().__init__(K, dim, **switches)
        self.codebook = nn.Parameter(torch.randn(K, dim))

    def codes(self) -> Tensor:
        return F.normalize(self.codebook, dim=1) if self.cosine else self.codebook

    @torch.no_grad()
    def place(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        self.codebook[rows], self.counts[rows] = codes, counts
