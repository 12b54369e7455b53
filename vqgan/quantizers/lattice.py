"""Bottlenecks whose codes are the points of a fixed lattice. No codebook is learned, so none can collapse by itself."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError, check_int
from vqgan.quantizers.base import Standardised


class Lattice(Standardised):
    """Channel i takes one of levels[i] values. An index consists of one digit per channel, the first one lowest.

    Raises InputError if `dim` is neither None nor the number of levels.
    """

    K: int
    basis: Tensor
    levels: Tensor

    def __init__(self, levels: Sequence[int], dim: int | None, **when: Any) -> None:
        levels = tuple(levels)
        for level in levels:
            check_int("quantizer.levels", level, 2)
        if dim not in (None, len(levels)):
            raise InputError(
                f"quantizer.dim={dim} must be null or {len(levels)}, the channels that K={math.prod(levels)} takes here"
            )
        super().__init__(math.prod(levels), len(levels), **when)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @abstractmethod
    def coordinates(self, digits: Tensor) -> Tensor:
        """Digits (..., dim) int64 in [0, levels) -> coordinates (..., dim) of about unit scale."""

    def to_index(self, digits: Tensor) -> Tensor:
        """Digits (..., dim) -> indices (...) int64 in [0, K)."""
        return (digits.long() * self.basis).sum(-1)

    def to_digits(self, indices: Tensor) -> Tensor:
        """The inverse of `to_index`."""
        return indices[..., None] // self.basis % self.levels

    @torch.no_grad()
    def draw_near(self, indices: Tensor, nearest: int) -> Tensor:
        """One step up or down in one channel, for the nearest points of a lattice are these, at any K; at either end of a
        channel the step leads inward. There are so few that `nearest` does not choose among them."""
        channel = torch.randint(self.dim, (len(indices), 1), device=indices.device)
        digits = self.to_digits(indices).gather(1, channel)[:, 0]
        top = self.levels[channel[:, 0]] - 1
        step = 2 * torch.randint_like(digits, 2) - 1
        step = torch.where(digits == 0, 1, torch.where(digits == top, -1, step))
        return indices + step * self.basis[channel[:, 0]]

    @torch.no_grad()
    def list_near(self, indices: Tensor, nearest: int) -> Tensor:
        """The step up and the step down in each channel, (n, 2 * dim); at either end of a channel twice the one inward."""
        digits = self.to_digits(indices)
        up = torch.where(digits == self.levels - 1, -1, 1)
        down = torch.where(digits == 0, 1, -1)
        steps = torch.stack([up, down], -1) * self.basis[:, None]
        return indices[:, None] + steps.flatten(1)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.unstandardise(self.coordinates(self.to_digits(indices)).movedim(-1, 1))
