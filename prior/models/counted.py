"""Priors that count codes instead of learning by gradients: the baselines of every learned prior."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.decoding.kv_decoder import StepCache
from prior.models.base import Autoregressive, StepDecoder

COUNT_CHUNK = 2**24  # codes counted at once, which takes about a gigabyte of memory


@dataclass
class Pairs:
    """How often each code follows each context; pairs that do not occur are left out.

    keys (P,) int64, sorted: context * K + code, contexts numbered as by `contexts`. n (P,) int64: the counts.
    """

    keys: Tensor
    n: Tensor


def contexts(codes: Tensor, K: int, num_codebooks: int) -> Tensor:
    """codes (B, L) -> the context of each, (B, L) int64 in [0, num_codebooks * (K + 1)).

    A context is book * (K + 1) + the code of the same codebook at the position before, or + K at the first position.
    """
    before = torch.cat([torch.full_like(codes[:, :num_codebooks], K), codes[:, :-num_codebooks]], 1)
    return torch.arange(codes.shape[1], device=codes.device) % num_codebooks * (K + 1) + before


def count_pairs(codes: NDArray[Any], K: int, num_codebooks: int) -> Pairs:
    """The pairs of codes (n, L), integers in [0, K) of any type, which may be a memory map."""
    keys, n = np.empty(0, np.int64), np.empty(0, np.int64)
    rows = max(1, COUNT_CHUNK // codes.shape[1])
    for first in range(0, len(codes), rows):
        chunk = torch.from_numpy(codes[first : first + rows].astype(np.int64))
        pairs = (contexts(chunk, K, num_codebooks) * K + chunk).numpy()
        chunk_keys, chunk_n = np.unique(pairs, return_counts=True)
        keys, n = np.concatenate([keys, chunk_keys]), np.concatenate([n, chunk_n])
        order = np.argsort(keys, kind="stable")  # merges two sorted runs in one pass
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
                f"a prior that counts codes can't learn {classes} classes; use conditional=false"
            )
        uniform = torch.full((self.num_codebooks, self.K), 1 / self.K)
        self.register_buffer("unigram", uniform)  # p(code) of each codebook

    @abstractmethod
    def fit(self, train: Pairs, val: Pairs) -> None:
        """Estimate p from the pairs of the training set; the validation set may tune its smoothing."""

    def count(self, train: NDArray[Any], val: NDArray[Any]) -> None:
        """`fit` to codes (n, L), integers in [0, K) of any type, which may be memory maps; the prior must be on the CPU."""
        self.fit(
            count_pairs(train, self.K, self.num_codebooks),
            count_pairs(val, self.K, self.num_codebooks),
        )

    def rows(self, context: Tensor) -> Tensor:
        """context (...) -> logits (..., K) float32 of the code that follows."""
        return self.unigram[context // (self.K + 1)].log()

    def p(self, pairs: Pairs) -> Tensor:
        """p(code | context) (P,) float64 of each pair, without computing the whole rows."""
        return self.unigram[pairs.keys // self.K // (self.K + 1), pairs.keys % self.K].double()

    def nats(self, pairs: Pairs) -> float:
        """Nats per token of the codes that were counted in `pairs`."""
        return float(-(self.p(pairs).log() * pairs.n).sum() / pairs.n.sum())

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.rows(contexts(codes, self.K, self.num_codebooks))

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        # In each codebook, the first code follows K, which stands for no code.
        none = torch.full((n,), self.K, device=self.unigram.device)
        codes = [none] * self.num_codebooks

        def decode(before: Tensor | None) -> Tensor:
            if before is not None:
                codes.append(before)
            t = len(codes) - self.num_codebooks
            return self.rows(t % self.num_codebooks * (self.K + 1) + codes[t])

        return decode
