"""Orders of a grid's positions: permutations of the raster order, and windows that cover it."""

import torch
from torch import Tensor


def raster(n: int, T: int, device: torch.device | str = "cpu") -> Tensor:
    """The raster order n times, (n, T) int64: the position of each step."""
    return torch.arange(T, device=device).expand(n, T)


def shuffled(n: int, T: int, share: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """n orders (n, T) int64: each is, with probability `share`, a random permutation, all equally likely, else raster."""
    random = torch.rand(n, T, device=device).argsort(1)
    return torch.where(torch.rand(n, 1, device=device) < share, random, raster(n, T, device))


def windows(grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that cover a grid, in raster order, half a window apart, the last ones at the border."""

    def cover(whole: int, part: int) -> list[slice]:
        starts = (*range(0, whole - part, max(part // 2, 1)), whole - part)
        return [slice(start, start + part) for start in starts]

    return [
        (rows, columns) for rows in cover(grid[0], size[0]) for columns in cover(grid[1], size[1])
    ]
