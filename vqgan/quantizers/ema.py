"""A codebook of running means."""

from typing import Any

import torch
from torch import Tensor

from codegrid.engine.collectives import all_reduce
from codegrid.engine.errors import InputError
from vqgan.quantizers.codebook import Codebook


class EMA(Codebook):
    """Nearest neighbour in a codebook of running means (van den Oord et al. 2017, eq. 1-3 and appendix A.1).

    Each code is sums / counts, both running over the encoder outputs assigned to it. Counts start at 1: from 0, the
    first update would divide codes without outputs by almost nothing. Switches as in `Codebook`.

    Raises InputError for a gradient that moves codes.
    """

    codebook: Tensor
    sums: Tensor

    def __init__(self, K: int, dim: int, **switches: Any) -> None:
        super().__init__(K, dim, **switches)
        if self.decoder_moves_codes:
            raise InputError(
                f"quantizer.gradient={self.gradient} moves codes by the decoder's gradient, and those of ema are running "
                "means; use quantizer=vq, or quantizer.gradient=rotation"
            )
        self.register_buffer("codebook", self.project(torch.randn(K, dim)))
        self.register_buffer("sums", self.codebook.clone())

    def codes(self) -> Tensor:
        return self.codebook

    def move_codes(self, z: Tensor, indices: Tensor, per_output: Tensor) -> None:
        sums = all_reduce(torch.zeros_like(self.sums).index_add_(0, indices, z))
        self.sums.lerp_(sums.mul_(per_output), 1 - self.decay)
        torch.div(self.sums, self.counts[:, None], out=self.codebook)
        if self.cosine:
            self.codebook.copy_(self.project(self.codebook))

    def set_codes(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        codes = self.project(codes)
        self.codebook[rows] = codes
        self.counts[rows] = counts
        self.sums[rows] = codes * counts[:, None]
