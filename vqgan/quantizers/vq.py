"""A codebook trained by gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from vqgan.quantizers.codebook import Codebook


class VQ(Codebook):
    """Nearest neighbour in a learned codebook (van den Oord et al. 2017, eq. 1-3); switches as in `Codebook`.

    The loss is |sg(z_e) - e|^2 + beta |z_e - sg(e)|^2, means over all elements. beta weighs the second term, the
    commitment of the encoder. Implementations that put it on the first term commit four times as strongly.
    """

    def __init__(self, K: int, dim: int, **switches: Any) -> None:
        super().__init__(K, dim, **switches)
        self.codebook = nn.Parameter(torch.randn(K, dim))

    def codes(self) -> Tensor:
        return self.project(self.codebook)

    @torch.no_grad()
    def set_codes(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        self.codebook[rows] = codes
        self.counts[rows] = counts
