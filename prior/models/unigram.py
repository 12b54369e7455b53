"""The prior that knows how often each code occurs."""

import torch

from prior.models.counted import Counted, Pairs


class Unigram(Counted):
    """p(code) in proportion to its count plus one (Laplace), in each codebook: what code frequencies alone are worth."""

    def fit(self, train: Pairs, val: Pairs) -> None:
        book, code = train.keys // self.K // (self.K + 1), train.keys % self.K
        counts = torch.ones(self.num_codebooks * self.K, dtype=torch.float64)
        counts.index_add_(0, book * self.K + code, train.n.double())
        counts = counts.view(self.num_codebooks, self.K)
        self.unigram.copy_(counts / counts.sum(1, keepdim=True))
