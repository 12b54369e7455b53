"""A codebook that moves as one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from vqgan.quantizers.base import from_first_rank
from vqgan.quantizers.codebook import Codebook


class SimVQ(Codebook):
    """Nearest neighbour among the images, under a learned linear map, of fixed random vectors (Zhu et al. 2024, eq. 5-7).

    Every code moves with every step, so none is left behind; there is nothing to revive. `start` makes the map the one
    that gives the codes the mean and covariance of the encoder's outputs.
    """

    basis: Tensor

    def __init__(self, K: int, dim: int = 64, **switches: Any) -> None:
        if refused := {"kmeans", "revive", "split"} & switches.keys():
            raise InputError(f"quantizer.{min(refused)} can't be set for simvq, whose codes move together; leave it out")
        super().__init__(K, dim, kmeans=False, revive=0.0, **switches)
        self.register_buffer("basis", torch.randn(K, dim) * dim**-0.5)
        self.map = nn.Linear(dim, dim)

    def codes(self) -> Tensor:
        codes = self.map(self.basis)
        return F.normalize(codes, dim=1) if self.cosine else codes

    def place(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        """Single codes can't be placed, and none ever dies."""

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        z = self.comparable(z.float())
        values, vectors = torch.linalg.eigh(torch.cov(z.t()).reshape(self.dim, self.dim))
        root = vectors * (values.clamp(min=1e-8) * self.dim).sqrt()
        self.map.weight.copy_(from_first_rank(root.contiguous()))
        self.map.bias.copy_(from_first_rank(z.mean(0)))
