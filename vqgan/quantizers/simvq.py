"""A codebook whose codes move together."""

from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.entropy import Entropy


class SimVQ(Codebook):
    """Nearest neighbour among fixed vectors under a learned linear map (Zhu et al. 2024, eq. 5-7).

    Every step moves every code, so no code dies and nothing needs revival. The fixed vectors are random, as in the
    paper, or with `kmeans` the standardised k-means centres of encoder outputs; the map then starts as the inverse of
    the standardisation. Switches as in `Codebook`, without revive and split.
    """

    grows = False  # a single code can't be set
    basis: Tensor

    def __init__(
        self, K: int, dim: int, entropy: Entropy | None = None, decay: float = 0.99, **switches: Any
    ) -> None:
        if refused := {"revive", "split"} & switches.keys():
            raise InputError(
                f"quantizer.{min(refused)} can't be set for simvq, whose codes move together; leave it out"
            )
        super().__init__(K, dim, entropy=entropy, decay=decay, revive=0.0, split=0.0, **switches)
        self.register_buffer("basis", torch.randn(K, dim) * dim**-0.5)
        self.map = nn.Linear(dim, dim)

    def codes(self) -> Tensor:
        return self.project(self.map(self.basis))

    @torch.no_grad()
    def set_codes(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        """Replace all codes; single ones can't be set, and `rows` is always all of them here."""
        mean = codes.mean(0)
        std = codes.std().clamp(min=1e-6)
        self.basis.copy_((codes - mean) / std)
        self.map.weight.copy_(torch.eye(self.dim) * std)
        self.map.bias.copy_(mean)
        self.counts.copy_(counts)
