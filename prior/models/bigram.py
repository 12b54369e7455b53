"""The prior that knows which code follows which."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.models.counted import Pairs
from prior.models.unigram import Unigram

STRENGTHS = torch.logspace(-2, 4, 25)


class Bigram(Unigram):
    """p(b | a) = (n(a, b) + s p(b)) / (n(a) + s) (MacKay & Peto 1995), p(b) the unigram, a the code before b in raster order.

    s is the strength with the fewest nats on the validation set: the baseline gets the benefit of the doubt. Only pairs that
    occur are stored, so K may be large.
    """

    keys: Tensor
    n: Tensor
    s: Tensor

    def __init__(self, codebook: Tensor, grid: tuple[int, int], classes: int = 0) -> None:
        super().__init__(codebook, grid, classes)
        self.register_buffer("s", torch.ones(()))
        for name in ("keys", "n"):  # of Pairs
            self.register_buffer(name, torch.empty(0, dtype=torch.int64), persistent=False)

    def get_extra_state(self) -> Tensor:
        """The pairs (2, P), which can't be buffers of the state dict, since their number depends on the data."""
        return torch.stack([self.keys, self.n])

    def set_extra_state(self, state: Tensor) -> None:
        self.keys, self.n = state.to(self.unigram.device)

    def fit(self, train: Pairs, val: Pairs) -> None:
        super().fit(train, val)
        self.keys, self.n = train.keys, train.n
        counts = self._counts(val)

        def nats(s: Tensor) -> float:
            return float(-smoothed(*counts, s).log() @ val.n.double())

        self.s.copy_(min(STRENGTHS, key=nats))

    def rows(self, context: Tensor) -> Tensor:
        p = self.s * self.unigram[context // (self.K + 1)]
        # The pairs of a context are neighbours: `many` of them from `first` on.
        first = torch.searchsorted(self.keys, context.flatten() * self.K)
        many = torch.searchsorted(self.keys, (context.flatten() + 1) * self.K) - first
        row = torch.arange(len(many), device=many.device).repeat_interleave(many)
        pair = torch.arange(len(row), device=row.device) + (first + many - many.cumsum(0))[row]
        p.view(-1, self.K)[row, self.keys[pair] % self.K] += self.n[pair]
        return p.log()  # logits, so n(a) + s cancels

    def p(self, pairs: Pairs) -> Tensor:
        return smoothed(*self._counts(pairs), self.s)

    def _counts(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """n(a, b), n(a) and p(b), float64, of each pair (a, b)."""
        before = F.pad(self.n.cumsum(0), (1, 0))  # the sum of all counts before each pair

        def between(first: Tensor, end: Tensor) -> Tensor:
            """The sum of the counts of keys in [first, end)."""
            low, high = torch.searchsorted(self.keys, first), torch.searchsorted(self.keys, end)
            return before[high] - before[low]

        a = pairs.keys // self.K
        return (
            between(pairs.keys, pairs.keys + 1).double(),
            between(a * self.K, (a + 1) * self.K).double(),
            super().p(pairs),
        )


def smoothed(both: Tensor, first: Tensor, alone: Tensor, s: Tensor) -> Tensor:
    """p(b | a) from n(a, b), n(a) and p(b)."""
    return (both + s * alone) / (first + s)
