"""Rounding, a few channels to a few levels each."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import InputError
from vqgan.quantizers.base import Quantized, float32, straight_through
from vqgan.quantizers.lattice import Lattice

PUBLISHED = {  # Mentzer et al. 2023, table 1: the levels for about so many codes
    2**8: (8, 6, 5), 2**10: (8, 5, 5, 5), 2**12: (7, 5, 5, 5, 5), 2**14: (8, 8, 8, 6, 5), 2**16: (8, 8, 8, 5, 5, 5),
}  # fmt: skip


SPREAD_AT_START = 0.45  # of a channel's standard deviation that tanh takes as 1: images have heavy tails, and with 1 most
# outputs would share the middle levels and leave the corners of the lattice empty


class FSQ(Lattice):
    """Finite scalar quantization (Mentzer et al. 2023, section 3.1): each channel is bounded by a tanh and rounded.

    `K` takes the published levels where the paper has some (their product is not exactly that power of two: K=256 is
    8*6*5 = 240 codes, and `K` of this object says 240), else the fewest levels of at most 8 that multiply to K exactly;
    `levels` says them outright. There is no loss: the reconstruction's gradient passes straight through the rounding.
    """

    def __init__(
        self, K: int | None = 512, levels: Sequence[int] | None = None, dim: int | None = None
    ) -> None:
        product = math.prod(levels) if levels is not None else K
        if (
            levels is not None
            and K not in (None, product)
            and tuple(levels) != PUBLISHED.get(K or 0)
        ):
            raise InputError(
                f"quantizer.levels={list(levels)} multiply to {product}, not to quantizer.K={K}; "
                f"use quantizer.K={product}, or quantizer.levels=null for levels that fit"
            )
        super().__init__(levels if levels is not None else levels_for(K), dim)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        super().start(z)
        self.spread *= SPREAD_AT_START

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        reach = (
            (self.levels - 1) * (1 + 1e-3) / 2
        )  # a little more than the outermost levels, so that they are reached
        offset = torch.where(
            self.levels % 2 == 0, 0.5, 0.0
        )  # an even number of levels has none in the middle
        z = self.standard(z_e).movedim(1, -1)
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        half = self.levels // 2
        indices = self.index(bounded.detach().round() + half)
        z_q = straight_through(self.original((bounded / half).movedim(-1, 1)), self.lookup(indices))
        return Quantized(z_e, z_q, indices, z_e.new_zeros(()))

    def value(self, digits: Tensor) -> Tensor:
        half = self.levels // 2
        return (digits - half) / half


def levels_for(K: int | None) -> tuple[int, ...]:
    """The published levels for K, or the fewest of 2 to 8 that multiply to K, the smallest as large as it can be."""
    if not isinstance(K, int) or K < 2:
        raise InputError(f"quantizer.K={K} must be a whole number of at least 2 codes")
    found = PUBLISHED.get(K) or _factors(K)
    if found is None:
        below = next(k for k in range(K - 1, 1, -1) if _factors(k))
        above = next(k for k in range(K + 1, 2 * K) if _factors(k))
        raise InputError(
            f"quantizer.K={K} is no product of levels from 2 to 8, which fsq needs; the nearest are {below} and {above}"
        )
    return found


def _factors(K: int, most: int = 8) -> tuple[int, ...] | None:
    if K == 1:
        return ()
    splits = [
        (level, _factors(K // level, level)) for level in range(most, 1, -1) if K % level == 0
    ]
    found = [(level, *rest) for level, rest in splits if rest is not None]
    return min(found, key=lambda levels: (len(levels), -levels[-1])) if found else None
