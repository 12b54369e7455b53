"""Orders of a grid's positions: permutations of the raster order."""

import torch
from torch import Tensor


def raster(n: int, T: int, device: torch.device | str = "cpu") -> Tensor:
    """The raster order n times, (n, T) int64: the position of each step."""
    return torch.arange(T, device=device).expand(n, T)


def shuffled(n: int, T: int, share: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """n orders (n, T) int64: each is, with probability `share`, a random permutation, all equally likely, else raster."""
    random = torch.rand(n, T, device=device).argsort(1)
    return torch.where(torch.rand(n, 1, device=device) < share, random, raster(n, T, device))
