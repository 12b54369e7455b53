"""Rounding: a few channels, a few levels each."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.gradients import choose_estimator
from vqgan.quantizers.lattice import Lattice
from vqgan.quantizers.precision import float32
from vqgan.quantizers.quantiles import Quantiles
from vqgan.quantizers.search import flatten

PUBLISHED_LEVELS = {  # Mentzer et al. 2023, table 1: approximate number of codes -> levels
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
MAX_LEVELS = 8  # per channel
QUANTILES = "quantiles"


class Activation(ABC):
    """How a channel becomes a number that is rounded, and what its levels are to the decoder.

    spread    the fraction of a channel's standard deviation at the start that becomes 1 before the activation
    """

    spread = 1.0

    @abstractmethod
    def bound(self, z: Tensor, levels: Tensor) -> Tensor:
        """z (..., dim), any numbers -> numbers whose nearest integer is a digit minus levels // 2."""

    @abstractmethod
    def scale(self, bounded: Tensor, levels: Tensor) -> Tensor:
        """Such numbers, rounded or not, -> coordinates (..., dim) of about unit scale."""


class Tanh(Activation):
    """The outermost levels are where the tanh ends (Mentzer et al. 2023, section 3.1)."""

    # Images have heavy tails: at 1, most outputs would share the middle levels and leave the corners of the lattice empty.
    spread = 0.45

    def bound(self, z: Tensor, levels: Tensor) -> Tensor:
        # A little beyond the outermost levels, so that outputs can reach them.
        reach = (levels - 1) * (1 + 1e-3) / 2
        # An even number of levels has no middle one.
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / reach)) * reach - offset

    def scale(self, bounded: Tensor, levels: Tensor) -> Tensor:
        return bounded / (levels // 2)


class Bins(Activation):
    """A cumulative distribution function, cut into as many equal bins as there are levels, whose centres are the codes
    (VP-VAE's FSP, arXiv 2602.17133): outputs of that distribution use all levels alike. Coordinates have unit variance then.
    """

    def __init__(self, cdf: Callable[[Tensor], Tensor]) -> None:
        self.cdf = cdf

    def bound(self, z: Tensor, levels: Tensor) -> Tensor:
        return self.cdf(z) * levels - 0.5 - levels // 2

    def scale(self, bounded: Tensor, levels: Tensor) -> Tensor:
        return ((bounded + levels // 2 + 0.5) * 2 / levels - 1) * math.sqrt(3)


def logistic(z: Tensor) -> Tensor:
    """A distribution function close to the normal one (iFSQ, arXiv 2601.17124)."""
    return torch.sigmoid(1.6 * z)


def normal(z: Tensor) -> Tensor:
    """The standard normal distribution function."""
    return (1 + torch.erf(z * 0.5**0.5)) / 2


SMOOTH_ACTIVATIONS: dict[str, Activation] = {
    "tanh": Tanh(),
    "logistic": Bins(logistic),
    "normal": Bins(normal),
}


class FSQ(Lattice):
    """Finite scalar quantization (Mentzer et al. 2023, section 3.1): each channel is bounded by an activation and rounded.

    For a K in the paper's table the levels are the published ones, whose product is not exactly that power of two:
    K=256 gives 8*6*5 = 240 codes, and the attribute `K` is 240. For any other K they are the fewest levels of at most 8
    that multiply to exactly K. `levels` sets them explicitly. There is no loss: the gradient of the reconstruction
    passes through the rounding as `gradient` says, and through the activation.

    With activation="quantiles" nothing is bounded or rounded: the cells are those of `Quantiles`, with thresholds and codes that
    follow the outputs by `decay`.

    Raises InputError if no levels multiply to K, if `levels` don't, and for an activation or gradient that there isn't.
    """

    training_settings = ("gradient", "decay")

    def __init__(
        self,
        K: int | None,
        levels: Sequence[int] | None,
        dim: int | None,
        activation: str,
        gradient: str,
        decay: float,
        **when: Any,
    ) -> None:
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
        super().__init__(levels if levels is not None else choose_levels(K), dim, **when)
        if activation not in (*SMOOTH_ACTIVATIONS, QUANTILES):
            raise InputError(
                f"quantizer.activation={activation} must be one of {', '.join((*SMOOTH_ACTIVATIONS, QUANTILES))}"
            )
        self.activation = SMOOTH_ACTIVATIONS.get(activation)
        self.quantiles = Quantiles(self.levels.tolist(), decay) if activation == QUANTILES else None
        self.gradient = gradient
        self.estimate = choose_estimator(gradient)

    @float32
    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        super().initialise(z)
        if self.activation is not None:
            self.spread *= self.activation.spread
        if self.quantiles is not None:
            rows = z[:, : self.dim].float()
            self.quantiles.initialise((rows - self.centre) / self.spread)

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        z = self.standardise(z_e).movedim(1, -1)
        if self.quantiles is not None:
            indices = self.quantiles.indices(z.detach())
            z_q = self.estimate(z_e, self.lookup(indices))
        else:
            indices, z_bounded = self.round(z)
            z_q = self.estimate(z_bounded, self.lookup(indices))
        return Quantized(z_e, z_q, indices, z_e.new_zeros(()))

    def round(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised z (B, h, w, dim) -> indices (B, h, w), and what is rounded to their codes (B, dim, h, w)."""
        assert self.activation is not None
        half = self.levels // 2
        bounded = self.activation.bound(z, self.levels)
        # Where a distribution function is 0 or 1 to float32, rounding may leave the levels by one.
        digits = torch.minimum(bounded.detach().round() + half, self.levels - 1).clamp(min=0)
        scaled = self.activation.scale(bounded, self.levels)
        return self.to_index(digits), self.unstandardise(scaled.movedim(-1, 1))

    @float32
    def compared(self, q: Quantized) -> Tensor:
        """What is rounded, where outputs are bounded first."""
        if self.activation is None:
            return q.z_e
        return self.round(self.standardise(q.z_e).movedim(1, -1))[1]

    def coordinates(self, digits: Tensor) -> Tensor:
        if self.quantiles is not None:
            return F.embedding(self.to_index(digits), self.quantiles.codes)
        assert self.activation is not None
        return self.activation.scale(digits - self.levels // 2, self.levels)

    @float32
    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        if self.quantiles is not None:
            assert q.indices is not None
            rows = flatten(self.standardise(q.z_e.detach()))
            self.quantiles.follow(rows, q.indices.flatten())


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
