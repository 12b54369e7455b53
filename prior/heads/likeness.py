"""Which codes are alike, by the vectors that the tokenizer decodes them from."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.engine.errors import InputError

MAX_VALUES = 64  # values of a channel that are one digit
MAX_AXES = 32  # main axes of all codes by which they are compared
POWER_STEPS = 2  # power iterations towards the main axis of a node


def order_by_likeness(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """The codes of vectors (K, dim) in an order in which near codes stand together.

    A balanced binary tree: each node is cut at its median along its main axis, which power iterations from the channel with the
    largest variance approximate.
    """
    if vectors.shape[1] > MAX_AXES:
        centred = vectors - vectors.mean(0)
        _, axes = np.linalg.eigh(centred.T @ centred)
        vectors = centred @ axes[:, -MAX_AXES:]
    K, dim = vectors.shape
    order = np.arange(K)
    size = 1 << max(1, (K - 1).bit_length())
    while size > 1:
        starts = np.arange(0, K, size)
        node = np.arange(K) // size
        counts = np.bincount(node)[:, None]
        x = vectors[order]
        x = x - (np.add.reduceat(x, starts) / counts)[node].astype(x.dtype)
        axes = np.eye(dim, dtype=x.dtype)[np.add.reduceat(x * x, starts).argmax(1)]
        for _ in range(POWER_STEPS):
            axes = np.add.reduceat(x * (x * axes[node]).sum(1, keepdims=True), starts)
            axes /= np.linalg.norm(axes, axis=1, keepdims=True) + np.finfo(np.float32).tiny
        order = order[np.lexsort(((x * axes[node]).sum(1), node))]
        size //= 2
    return order


def rank_codes(vectors: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The levels of the digits that describe a code, and the rank (K,) of each code: the number that its digits spell.

    The codes of a lattice (lfq, bsq, fsq) have a digit for each channel, which is the rank of its value, the first channel's
    highest. All others have the bits of their place in `order_by_likeness`, so codes that share the first bits are alike.
    """
    points = vectors.detach().cpu().float().numpy()
    lattice = read_lattice(points)
    if lattice is not None:
        return lattice
    bits = max(1, (len(points) - 1).bit_length())
    ranks = np.empty(len(points), np.int64)
    ranks[order_by_likeness(points)] = np.arange(len(points))
    return (2,) * bits, torch.from_numpy(ranks)


def read_lattice(points: NDArray[np.float32]) -> tuple[tuple[int, ...], Tensor] | None:
    """Levels and ranks of points (K, dim) that are all combinations of a few values per channel; None for others."""
    levels: list[int] = []
    ranks = np.zeros(len(points), np.int64)
    for channel in points.T:
        values, digits = np.unique(channel, return_inverse=True)
        if len(values) == 1:
            continue
        levels.append(len(values))
        if len(values) > MAX_VALUES or math.prod(levels) > len(points):
            return None
        ranks = ranks * len(values) + digits
    is_whole = math.prod(levels) == len(points) and len(np.unique(ranks)) == len(points)
    return (tuple(levels), torch.from_numpy(ranks)) if len(levels) > 1 and is_whole else None


def group_codes(vectors: Tensor, size: int) -> Tensor:
    """The number of each code's group (K,) int64: groups of `size` codes that are alike; the last may be smaller.

    Raises InputError unless size is a power of two.
    """
    if not isinstance(size, int) or size < 2 or size & (size - 1):
        raise InputError(f"prior.head.group_size={size} must be a power of two, such as 16")
    order = order_by_likeness(vectors.detach().cpu().float().numpy())
    groups = np.empty(len(order), np.int64)
    groups[order] = np.arange(len(order)) // size
    return torch.from_numpy(groups)
