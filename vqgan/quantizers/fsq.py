"""Rounding: a few channels, a few levels each."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.gradients import straight_through
from vqgan.quantizers.lattice import Lattice
from vqgan.quantizers.precision import float32

PUBLISHED_LEVELS = {  # Mentzer et al. 2023, table 1: approximate number of codes -> levels
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
MAX_LEVELS = 8  # per channel

# The fraction of a channel's standard deviation that maps to 1 before the tanh. Images have heavy tails: at 1, most
# outputs would share the middle levels and leave the corners of the lattice empty.
INITIAL_SPREAD = 0.45


class FSQ(Lattice):
    """Finite scalar quantization (Mentzer et al. 2023, section 3.1): each channel is bounded by a tanh and rounded.

    For a K in the paper's table the levels are the published ones, whose product is not exactly that power of two:
    K=256 gives 8*6*5 = 240 codes, and the attribute `K` is 240. For any other K they are the fewest levels of at most 8
    that multiply to exactly K. `levels` sets them explicitly. There is no loss: the gradient of the reconstruction
    passes straight through the rounding.

    Raises InputError if no levels multiply to K, or if `levels` don't.
    """

    def __init__(self, K: int | None, levels: Sequence[int] | None, dim: int | None) -> None:
        product = math.prod(levels) if levels is not None else K
        if (
            levels is not None
            and K not in (None, product)
            and tuple(levels) != PUBLISHED_LEVELS.get(K or 0)
        ):
            raise InputError(
                f"quantizer.levels={list(levels)} multiply to {product}, not to quantizer.K={K}; "
                f"use quantizer.K={product}, or quantizer.levels=null for levels that fit"
            )
        super().__init__(levels if levels is not None else choose_levels(K), dim)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        super().initialise(z)
        self.spread *= INITIAL_SPREAD

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        # A little beyond the outermost levels, so that outputs can reach them.
        reach = (self.levels - 1) * (1 + 1e-3) / 2
        # An even number of levels has no middle one.
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        z = self.standardise(z_e).movedim(1, -1)
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        half = self.levels // 2
        indices = self.to_index(bounded.detach().round() + half)
        z_bounded = self.unstandardise((bounded / half).movedim(-1, 1))
        z_q = straight_through(z_bounded, self.lookup(indices))
        return Quantized(z_e, z_q, indices, z_e.new_zeros(()))

    def coordinates(self, digits: Tensor) -> Tensor:
        half = self.levels // 2
        return (digits - half) / half


def choose_levels(K: int | None) -> tuple[int, ...]:
    """The published levels for K, else the fewest of 2 to 8 that multiply to K, with the smallest as large as possible."""
    if not isinstance(K, int) or K < 2:
        raise InputError(f"quantizer.K={K} must be a whole number of at least 2 codes")
    levels = PUBLISHED_LEVELS.get(K) or _factorise(K)
    if levels is None:
        below = next(k for k in range(K - 1, 1, -1) if _factorise(k))
        above = next(k for k in range(K + 1, 2 * K) if _factorise(k))
        raise InputError(
            f"quantizer.K={K} is no product of levels from 2 to {MAX_LEVELS}, which fsq needs; "
            f"the nearest are {below} and {above}"
        )
    return levels


def _factorise(K: int, largest: int = MAX_LEVELS) -> tuple[int, ...] | None:
    """K as a product of descending factors from 2 to `largest`; None if there is none."""
    if K == 1:
        return ()
    candidates = []
    for level in range(largest, 1, -1):
        rest = _factorise(K // level, level) if K % level == 0 else None
        if rest is not None:
            candidates.append((level, *rest))
    return min(candidates, key=lambda levels: (len(levels), -levels[-1]), default=None)
