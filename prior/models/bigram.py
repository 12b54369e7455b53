"""The baseline that every learned prior must beat."""

import torch
from torch import Tensor


def bigram_nats(train: Tensor, val: Tensor, K: int) -> float:
    """Nats per token of val (n, T) under a bigram model of train (m, T), both int64 raster sequences in [0, K).

    p(b | a) = (count(a, b) + s p(b)) / (count(a) + s), the first code given a start symbol, p(b) from counts plus one.
    s is the one that suits the validation set best: the baseline gets the benefit of the doubt.
    """
    unigram = torch.bincount(train.flatten(), minlength=K).double() + 1
    unigram /= unigram.sum()
    counts = torch.bincount(_pairs(train, K), minlength=(K + 1) * K).double().view(K + 1, K)
    pairs = _pairs(val, K)
    before, code = pairs // K, pairs % K
    found = counts[before, code]
    of_context = counts.sum(1)[before]
    strengths = torch.logspace(-2, 4, 25, dtype=torch.float64)
    return min(float(-((found + s * unigram[code]) / (of_context + s)).log().mean()) for s in strengths)


def _pairs(sequences: Tensor, K: int) -> Tensor:
    """(n, T) -> (n*T,): code before (K at the start) times K plus code."""
    before = torch.cat([torch.full_like(sequences[:, :1], K), sequences[:, :-1]], 1)
    return (before * K + sequences).flatten()
