"""How far apart the codes of two sets of images are, by how often each code occurs."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.evaluation.codebook import CodebookUse

MIXTURES = 10
MIXTURE_SEED = 0


def histogram_distance(a: Tensor, b: Tensor) -> float:
    """The Hellinger distance between the frequencies of codes, 0 to 1, from counts (parts, K) of two sets (CHD, Jia et al. 2026).

    Of several codebooks, or scales, the mean over the codes: each part counts as much as it has codes.
    """
    a, b = a.double(), b.double()
    p, q = (counts / counts.sum(1, keepdim=True) for counts in (a, b))
    distances = ((p.sqrt() - q.sqrt()).square().sum(1) / 2).sqrt()
    shares = a.sum(1) / a.sum()
    return float(distances @ shares)


def mixed_distance(a: NDArray[Any], b: NDArray[Any], code_use: CodebookUse) -> float:
    """The histogram distance between the codes of images a (n, ...) and b (m, ...) if both sets were of one distribution: the
    mean over random divisions of all images in sets of n and m. `code_use` is what counts codes; its counts are reset.

    It says what of a distance is due to the number of images. An image is divided as a whole, as its codes depend on each other.
    """
    codes = np.concatenate([a.reshape(len(a), -1), b.reshape(len(b), -1)])
    codes = codes[np.lexsort(codes.T)]  # so that the order of the images doesn't matter
    random = np.random.default_rng(MIXTURE_SEED)
    total = 0.0
    for _ in range(MIXTURES):
        order = random.permutation(len(codes))
        first, second = (
            tally_codes(codes[rows].reshape(-1, *a.shape[1:]), code_use)
            for rows in (order[: len(a)], order[len(a) :])
        )
        total += histogram_distance(first, second)
    return total / MIXTURES


def tally_codes(codes: NDArray[Any], code_use: CodebookUse) -> Tensor:
    """How often each code occurs in images (n, ...), (parts, K) int64; the counts of `code_use` are reset."""
    code_use.reset()
    code_use.update(torch.from_numpy(codes.astype(np.int64)))
    counts = code_use.counts.clone()
    code_use.reset()
    return counts
