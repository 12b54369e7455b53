"""Priors that count where others learn by gradients: the baselines that every learned prior is compared with."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import InputError
from prior.models.base import Autoregressive, StepDecoder

COUNT_CHUNK = 2**24  # codes that are counted at once: about a gigabyte of memory


@dataclass
class Pairs:
    """Which code follows which, and how often: of each pair that occurs its key, context * K + code, and its number.

    keys (P,) int64 are sorted; n (P,) int64. A context is as `contexts` numbers it.
    """

    keys: Tensor
    n: Tensor


def contexts(codes: Tensor, K: int, num_codebooks: int) -> Tensor:
    """codes (B, L) -> (B, L) int64: book * (K + 1) + the code of the same book at the position before, K at the first."""
    before = torch.cat([torch.full_like(codes[:, :num_codebooks], K), codes[:, :-num_codebooks]], 1)
    return torch.arange(codes.shape[1], device=codes.device) % num_codebooks * (K + 1) + before


def count_pairs(codes: NDArray[Any], K: int, num_codebooks: int) -> Pairs:
    """The pairs of codes (n, L), integers in [0, K) of any type, which may lie in a memory map."""
    keys, n = np.empty(0, np.int64), np.empty(0, np.int64)
    rows = max(1, COUNT_CHUNK // codes.shape[1])
    for first in range(0, len(codes), rows):
        chunk = torch.from_numpy(codes[first : first + rows].astype(np.int64))
        found, times = np.unique(
            (contexts(chunk, K, num_codebooks) * K + chunk).numpy(), return_counts=True
        )
        keys, n = np.concatenate([keys, found]), np.concatenate([n, times])
        order = np.argsort(keys, kind="stable")  # which merges two sorted runs in one pass
        keys, n = keys[order], n[order]
        new = np.flatnonzero(np.diff(keys, prepend=-1))
        keys, n = keys[new], np.add.reduceat(n, new)
    return Pairs(torch.from_numpy(keys), torch.from_numpy(n))


class Counted(Autoregressive):
    """p(code | the code of the same codebook at the position before), found by counting; uniform until `count`."""

    unigram: Tensor

    def __init__(self, codebook: Tensor, grid: tuple[int, int], classes: int = 0) -> None:
        super().__init__(codebook, grid)
        if classes:
            raise InputError(
                f"a prior that counts codes knows none of the {classes} classes; use conditional=false"
            )
        self.register_buffer(
            "unigram", torch.full((self.num_codebooks, self.K), 1 / self.K)
        )  # p(code) of each codebook

    @abstractmethod
    def fit(self, train: Pairs, val: Pairs) -> None:
        """Take p from the pairs of the training set, and of the validation set what is to suit it."""

    def count(self, train: NDArray[Any], val: NDArray[Any]) -> None:
        """`fit` to codes (n, L), integers in [0, K) of any type, which may lie in a memory map; the prior is on the CPU."""
        self.fit(
            count_pairs(train, self.K, self.num_codebooks),
            count_pairs(val, self.K, self.num_codebooks),
        )

    def rows(self, context: Tensor) -> Tensor:
        """context (...) -> logits (..., K) float32 of the code that follows."""
        return self.unigram[context // (self.K + 1)].log()

    def p(self, seen: Pairs) -> Tensor:
        """p(code | context) (P,) float64 of each pair, without the rows of which it is one entry."""
        return self.unigram[seen.keys // self.K // (self.K + 1), seen.keys % self.K].double()

    def nats(self, seen: Pairs) -> float:
        """Nats per token of the codes whose pairs these are."""
        return float(-(self.p(seen).log() * seen.n).sum() / seen.n.sum())

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.rows(contexts(codes, self.K, self.num_codebooks))

    def decoder(self, n: int, labels: Tensor | None = None) -> StepDecoder:
        told = [
            torch.full((n,), self.K, device=self.unigram.device)
        ] * self.num_codebooks  # what the first of each book follows

        def decode(before: Tensor | None) -> Tensor:
            if before is not None:
                told.append(before)
            t = len(told) - self.num_codebooks
            return self.rows(t % self.num_codebooks * (self.K + 1) + told[t])

        return decode
