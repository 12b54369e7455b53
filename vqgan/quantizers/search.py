"""Exact nearest-neighbour search in tiles, and grids of vectors as rows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(
    z: Tensor, codebook: Tensor, max_scores: int = 2**21, tile: int = 2048, group: int = 32
) -> Tensor:
    """Index (n,) of the code in codebook (K, dim) nearest to each z (n, dim); on a tie, the lowest index.

    Both are float32: in bf16, 3-6% of the indices differ. The nearest code has the largest score z . e - |e|^2 / 2.
    """
    return best_match(z, codebook, codebook.square().sum(1) / 2, max_scores, tile, group)


def best_match(
    z: Tensor,
    codebook: Tensor,
    offsets: Tensor,
    max_scores: int = 2**21,
    tile: int = 2048,
    group: int = 32,
) -> Tensor:
    """Index (n,) of the code in codebook (K, dim) with the largest z . e - offset for each z (n, dim), with offsets (K,); on a
    tie, the lowest index.

    At most `max_scores` scores (8 MiB) are held at a time, for at most `tile` codes. A plain maximum runs at memory speed
    and an argmax does not, so the best score per `group` of codes comes first, and then its place in the winning group.
    """
    K = len(codebook)
    tile = min(tile, -(-K // group) * group)
    if padding := -K % tile:
        codebook = F.pad(codebook, (0, 0, 0, padding))
        offsets = F.pad(offsets, (0, padding), value=math.inf)  # score -inf: never the best
    tiles = [
        (-offset, codes.t())
        for offset, codes in zip(offsets.split(tile), codebook.split(tile), strict=True)
    ]
    indices = []
    for rows in z.split(max(1, max_scores // tile)):
        each_row = torch.arange(len(rows), device=z.device)
        for i, (bias, codes) in enumerate(tiles):
            scores = torch.addmm(bias, rows, codes).view(len(rows), -1, group)
            top, winner = scores.amax(2).max(1)
            index = i * tile + winner * group + scores[each_row, winner].argmax(1)
            if i == 0:
                best, best_index = top, index
            else:
                better = top > best
                best = torch.where(better, top, best)
                best_index = torch.where(better, index, best_index)
        indices.append(best_index)
    return torch.cat(indices)


def flatten(z: Tensor) -> Tensor:
    """(B, dim, h, w) -> (B*h*w, dim)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """(B*h*w, dim) -> (B, dim, h, w) with B, h and w of `like`; each vector stays contiguous in memory."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).movedim(-1, 1)
