"""A codebook that moves as one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from vqgan.quantizers.codebook import Codebook


class SimVQ(Codebook):
    """Nearest neighbour among the images, under a learned linear map, of fixed vectors (Zhu et al. 2024, eq. 5-7).

    Every code moves with every step, so none is left behind; there is nothing to revive. The fixed vectors are random,
    as in the paper, or with `kmeans` the k-means of the first encoder outputs, standardised; the map then starts as the
    one that puts them back.
    """

    basis: Tensor

    def __init__(self, K: int, dim: int = 64, **switches: Any) -> None:
        if refused := {"revive", "split"} & switches.keys():
            raise InputError(
                f"quantizer.{min(refused)} can't be set for simvq, whose codes move together; leave it out"
            )
        super().__init__(K, dim, revive=0.0, **switches)
        self.register_buffer("basis", torch.randn(K, dim) * dim**-0.5)
        self.map = nn.Linear(dim, dim)

    def codes(self) -> Tensor:
        codes = self.map(self.basis)
        return F.normalize(codes, dim=1) if self.cosine else codes

    @torch.no_grad()
    def place(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        """All codes at once, at the start; single ones can't be placed, and none ever dies."""
        mean, spread = codes.mean(0), codes.std().clamp(min=1e-6)
        self.basis.copy_((codes - mean) / spread)
        self.map.weight.copy_(torch.eye(self.dim) * spread)
        self.map.bias.copy_(mean)
        self.counts.copy_(counts)
