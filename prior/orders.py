"""Orders of a grid's positions: permutations of the raster order, and windows that cover it."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def raster(n: int, T: int, device: torch.device | str = "cpu") -> Tensor:
    """The raster order n times, (n, T) int64: the position of each step."""
    return torch.arange(T, device=device).expand(n, T)


def shuffled(n: int, T: int, share: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """n orders (n, T) int64: each is, with probability `share`, a random permutation, all equally likely, else raster."""
    random = torch.rand(n, T, device=device).argsort(1)
    return torch.where(torch.rand(n, 1, device=device) < share, random, raster(n, T, device))


@cache
def halton(grid: tuple[int, int]) -> tuple[int, ...]:
    """The T positions of a grid (h, w) in the order in which the Halton sequence of bases 2 and 3 first visits them.

    Positions that follow one another lie far apart, and those up to any step are spread evenly (Besnier et al. 2025).
    """
    h, w = grid
    # So many points in a row have one in each box of 1 / 2^a x 1 / 3^b, and each position holds such a box.
    boxes = power_from(2, 2 * h) * power_from(3, 2 * w)
    points = np.arange(1, boxes + 1)
    visits = scaled_inverse(points, 2, h) * w + scaled_inverse(points, 3, w)
    first = np.unique(visits, return_index=True)[1]
    return tuple(visits[np.sort(first)].tolist())


def power_from(base: int, least: int) -> int:
    """The smallest power of `base` that is at least `least`."""
    power = 1
    while power < least:
        power *= base
    return power


def scaled_inverse(points: NDArray[np.int64], base: int, side: int) -> NDArray[np.int64]:
    """The radical inverses of these numbers, their digits mirrored at the point, times `side` and rounded down."""
    mirrored = np.zeros_like(points)
    scale = 1
    while (points >= scale).any():
        mirrored = mirrored * base + points // scale % base
        scale *= base
    return mirrored * side // scale


def windows(grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that cover a grid, in raster order, half a window apart, the last ones at the border."""

    def cover(whole: int, part: int) -> list[slice]:
        starts = (*range(0, whole - part, max(part // 2, 1)), whole - part)
        return [slice(start, start + part) for start in starts]

    return [
        (rows, columns) for rows in cover(grid[0], size[0]) for columns in cover(grid[1], size[1])
    ]
