"""Several codebooks side by side."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import InputError
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.several import Several


class Product(Several):
    """The channels in `num_codebooks` groups, each with a codebook of its own (Jegou et al. 2011, section II-B).

    Channel c is of group c mod num_codebooks, so that groups of a start from patches, whose first channels vary most, are alike.
    """

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int = 512,
        num_codebooks: int = 2,
        dim: int | None = 64,
    ) -> None:
        if dim and num_codebooks > 0 and dim % num_codebooks:
            raise InputError(
                f"quantizer.dim={dim} is not divisible by quantizer.num_codebooks={num_codebooks}; "
                f"use quantizer.dim={dim // num_codebooks * num_codebooks or num_codebooks}"
            )
        super().__init__(
            inner,
            K,
            num_codebooks,
            dim,
            dim // num_codebooks if dim and num_codebooks > 0 else None,
        )

    def forward(self, z_e: Tensor) -> Quantized:
        parts = [inner(z_e[:, i :: self.num_codebooks]) for i, inner in enumerate(self.each)]
        return self.together(
            interleave([part.z_e for part in parts]),
            interleave([part.z_q for part in parts]),
            parts,
        )

    def lookup(self, indices: Tensor) -> Tensor:
        return interleave(
            [inner.lookup(i) for inner, i in zip(self.each, indices.unbind(-1), strict=True)]
        )

    def start(self, z: Tensor) -> None:
        for i, inner in enumerate(self.each):
            inner.start(z[:, i :: self.num_codebooks].contiguous())


def interleave(groups: list[Tensor]) -> Tensor:
    """(B, d, h, w) of each group -> (B, num_codebooks * d, h, w), channel c of group c mod num_codebooks."""
    return torch.stack(groups, 2).flatten(1, 2)
