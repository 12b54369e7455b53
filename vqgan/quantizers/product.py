"""Several codebooks, each for a group of channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.multi_codebook import MultiCodebook


class Product(MultiCodebook):
    """The channels in `num_codebooks` groups, each with its own codebook (Jegou et al. 2011, section II-B).

    Channel c belongs to group c mod num_codebooks. A tokenizer initialised from patches sorts its channels by variance,
    so this makes the groups alike. Raises InputError if num_codebooks does not divide dim.
    """

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int,
        num_codebooks: int,
        dim: int | None,
        **when: Any,
    ) -> None:
        inner_dim = None
        if dim and num_codebooks > 0:
            if dim % num_codebooks:
                raise InputError(
                    f"quantizer.dim={dim} is not divisible by quantizer.num_codebooks={num_codebooks}; "
                    f"use quantizer.dim={dim // num_codebooks * num_codebooks or num_codebooks}"
                )
            inner_dim = dim // num_codebooks
        super().__init__(inner, K, num_codebooks, dim, inner_dim, **when)

    def forward(self, z_e: Tensor) -> Quantized:
        parts = [
            inner(z_e[:, i :: self.num_codebooks]) for i, inner in enumerate(self.inner_quantizers)
        ]
        return self.combine(
            interleave([part.z_e for part in parts]),
            interleave([part.z_q for part in parts]),
            parts,
        )

    def bypass(self, z_e: Tensor) -> Quantized:
        parts = [
            inner.bypass(z_e[:, i :: self.num_codebooks])
            for i, inner in enumerate(self.inner_quantizers)
        ]
        z = interleave([part.z_q for part in parts])
        return Quantized(z, z, None, z.new_zeros(()))

    def lookup(self, indices: Tensor) -> Tensor:
        pairs = zip(self.inner_quantizers, self.split_codebooks(indices), strict=True)
        return interleave([inner.lookup(own_indices) for inner, own_indices in pairs])

    def grow_from(self, smaller: Quantizer, z: Tensor) -> None:
        """Let each codebook grow by its own channels of z (n, dim)."""
        assert isinstance(smaller, Product)
        self.updates.copy_(smaller.updates)
        pairs = zip(self.inner_quantizers, smaller.inner_quantizers, strict=True)
        for i, (inner, old) in enumerate(pairs):
            inner.grow_from(old, z[:, i :: self.num_codebooks].contiguous())

    def initialise(self, z: Tensor) -> None:
        for i, inner in enumerate(self.inner_quantizers):
            inner.initialise(z[:, i :: self.num_codebooks].contiguous())


def interleave(groups: list[Tensor]) -> Tensor:
    """(B, d, h, w) per group -> (B, num_codebooks * d, h, w), where channel c is of group c mod num_codebooks."""
    return torch.stack(groups, 2).flatten(1, 2)
