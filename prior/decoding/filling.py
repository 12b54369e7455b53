"""Which codes a prior that fills in masked codes draws next, and which of them it draws again."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from codegrid.engine.sizes import Size
from prior.decoding.sampling import Numbers, Sampler
from prior.orders import halton


class Filling:
    """The places of n samples, in an order that is settled before anything is drawn.

    `missing` (n, m) are the places without a code, the next ones first. `drawn` (n, r) are those with a code, the first to be
    drawn again first: the ones drawn longest ago, which depend on the fewest others. Known codes are in neither.
    """

    def __init__(self, places: Tensor, uniform: Tensor, numbers: Numbers, sampler: Sampler) -> None:
        """`uniform` (n, L) are the numbers of the first draw at each place; `numbers` yields those of later ones."""
        self.missing = places
        self.drawn = places[:, :0]
        self.uniform = uniform
        self.numbers = numbers
        self.redraws = sampler.remask > 0

    def candidates(self, count: int) -> Tensor:
        """The places (n, c) to propose codes for, `count` of which will be accepted."""
        return self.missing[:, :count]

    def next_uniform(self) -> Tensor:
        """The numbers (n, L), uniform in [0, 1), that codes are proposed by."""
        uniform = self.uniform
        if self.redraws:
            self.uniform = self.numbers.uniform(uniform.shape[1])
        return uniform

    def rank(self, places: Tensor, logp: Tensor, progress: float) -> None:
        """Sort `missing` by log p (n, c) of the codes proposed for these places (n, c); here the order is settled.

        `progress` in (0, 1] is the share of the steps that are done after this one.
        """

    def accept(self, count: int) -> Tensor:
        """Move the first places from `missing` to `drawn`; returns them, (n, count)."""
        accepted, self.missing = self.missing.tensor_split([count], 1)
        self.drawn = torch.cat([self.drawn, accepted], 1)
        return accepted

    def remask(self, count: int) -> Tensor:
        """Move the first places from `drawn` to the end of `missing`; returns them, (n, count)."""
        remasked, self.drawn = self.drawn.tensor_split([count], 1)
        self.missing = torch.cat([self.missing, remasked], 1)
        return remasked

    def renew(self, count: int) -> Tensor:
        """Move the first places of `drawn` to its end, since they are drawn again at once; returns them, (n, count)."""
        renewed, rest = self.drawn.tensor_split([count], 1)
        self.drawn = torch.cat([rest, renewed], 1)
        return renewed


class ConfidenceFilling(Filling):
    """The most confident proposals are accepted, the least confident codes are drawn again (MaskGIT, Chang et al. 2022).

    The confidence is log p plus Gumbel noise, which falls linearly to 0 with the steps (section 3.2).
    """

    def __init__(self, places: Tensor, numbers: Numbers, sampler: Sampler, L: int) -> None:
        super().__init__(places, torch.empty(0), numbers, sampler)
        self.shape = (2, L)
        self.noise = sampler.choice_temperature
        self.logp = torch.zeros(len(places), L, device=places.device)  # of the last code proposed
        self.confidence = self.logp

    def candidates(self, count: int) -> Tensor:
        return self.missing

    def next_uniform(self) -> Tensor:
        uniform, self.luck = self.numbers.uniform(*self.shape).unbind(1)
        return uniform

    def rank(self, places: Tensor, logp: Tensor, progress: float) -> None:
        self.logp.scatter_(1, places, logp.float())
        gumbel = -self.luck.clamp(min=1e-300).log().neg().log()
        self.confidence = self.logp + self.noise * (1 - progress) * gumbel
        self.missing = self.sort(self.missing, descending=True)

    def accept(self, count: int) -> Tensor:
        accepted = super().accept(count)
        self.drawn = self.sort(self.drawn, descending=False)
        return accepted

    def sort(self, places: Tensor, descending: bool) -> Tensor:
        """The places (n, r) by their confidence."""
        order = self.confidence.gather(1, places).argsort(1, descending=descending)
        return places.gather(1, order)


def begin_filling(
    order: str, grid: Size, codes: Tensor, known: Tensor, numbers: Numbers, sampler: Sampler
) -> Filling:
    """The places of codes (n, L) that are not `known` (L,), to be filled in in an order of ORDERS.

    Each sample has a random order of its own, or begins somewhere else in the Halton sequence.
    """
    n, L = codes.shape
    is_known = known.tolist()
    walk = halton(grid) if order == "halton" else range(L)
    places = torch.tensor([t for t in walk if not is_known[t]], device=codes.device).long()
    if order == "confidence":
        return ConfidenceFilling(places.repeat(n, 1), numbers, sampler, L)
    chance, uniform = numbers.uniform(2, L).unbind(1)
    if order == "random":
        return Filling(places[chance[:, places].argsort(1)], uniform, numbers, sampler)
    m = len(places)
    start = (chance[:, :1] * m).long()
    steps = start + torch.arange(m, device=codes.device)
    return Filling(places[steps % max(m, 1)], uniform, numbers, sampler)


def plan_steps(missing: Sequence[int], remask: float) -> Iterator[tuple[int, int]]:
    """How many codes each step accepts and masks again, so that missing[s] are missing after step s, of missing[0] at first.

    A step masks the share `remask` of as many as it can: all that are drawn, or as many as may be missing after it (ReMDM,
    rescaled, Wang et al. 2025; in numbers of codes instead of probabilities). Fractions are carried over to the next step.
    """
    carried = 0.0
    total = missing[0]
    for before, after in pairwise(missing):
        most = min(total - before, after)
        carried += remask * most
        remasked = min(int(carried), most)
        carried -= remasked
        yield before - after + remasked, remasked
