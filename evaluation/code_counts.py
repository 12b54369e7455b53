"""How often codes occur."""

import torch
from torch import Tensor


def count_uses(indices: Tensor, K: int) -> Tensor:
    """How often each code occurs, (K,) int64, for indices (n,) in [0, K); torch.bincount waits for the device to find the
    largest index."""
    return torch.zeros(K, dtype=torch.int64, device=indices.device).scatter_add_(
        0, indices, torch.ones_like(indices)
    )
