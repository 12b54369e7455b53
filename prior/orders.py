"""Orders in which the positions of a grid can be gone through: permutations of its raster sequence."""

import torch
from torch import Tensor


def raster(n: int, T: int, device: torch.device | str = "cpu") -> Tensor:
    """n times the raster order (n, T) int64: the position that comes at each step."""
    return torch.arange(T, device=device).expand(n, T)


def shuffled(n: int, T: int, share: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """n orders (n, T) int64, each with probability `share` a random one of its own, all being as likely, else raster."""
    random = torch.rand(n, T, device=device).argsort(1)
    return torch.where(torch.rand(n, 1, device=device) < share, random, raster(n, T, device))
