"""Many positions in one pass, with what is drawn distributed exactly as code by code: coupled speculative Jacobi decoding.

Code by code, the code at t is the largest sum of the logits at t, after truncation, and of Gumbel noise that only depends on the
sample and on t. So a grid is a function of its noise. A pass reads a window of drafts and draws at all of its positions by their
noise. A code is final if all codes before it were read as they are in the end: the first of a window always is, and each further
one up to the first draft that differs from the code drawn for it. The others are the next drafts, and since the noise is the
same, most of them stay as they are. So the codes are those of drawing code by code with the same noise, whatever the window, up to
the rounding of logits.

Song et al. 2021 (Jacobi iterations), Teng et al. 2024 (of drafts that are drawn), Daliri et al. 2024 (Gumbel noise as a coupling).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.decoding.sampling import AUTO, GumbelNoise, Sampler, guided

MIN_AUTO = 4  # positions in the windows that `auto` chooses: shorter ones hardly pay
MAX_AUTO = 16  # longer ones take as many passes
ALLOWED_LOSS = 0.03  # of the steps of drawing code by code, before windows that don't pay are ended


class WindowDecoder(Protocol):
    """The logits of windows of positions, one for each sample."""

    def __call__(self, before: Tensor, first: Tensor, end: int) -> Tensor:
        """The codes (n, W) before the positions first (n,) to first + W - 1 -> the logits (n, W, K) there.

        `end` is the largest first + W. At position 0 no code is read. Positions may lie beyond the last one, by up to W.
        """

    def select(self, samples: Tensor) -> None:
        """Keep these samples only, (m,) int64."""


@dataclass
class Pace:
    """How many positions the next pass has: `window`, or 1 from the pass on before which windows had lost more than `allowed`.

    All is counted in steps of drawing code by code: `cost` is that of a pass, an estimate by its rows and not by a clock, so that
    a seed always draws by the same windows.
    """

    window: int
    cost: float
    allowed: float
    spent: float = 0.0

    def next_window(self, drawn: float) -> int:
        """The positions of the next pass, when `drawn` codes of each sample are final, on average."""
        if self.spent > drawn + self.allowed:
            self.window, self.cost = 1, 1.0
        self.spent += self.cost
        return self.window


def choose_pace(sampler: Sampler, n: int, T: int, device: torch.device, dtype: torch.dtype) -> Pace:
    """The windows of n samples of T codes, twice as many with guidance, whose products are in `dtype`; 1: code by code."""
    if sampler.parallel != AUTO:
        return Pace(min(int(sampler.parallel), T), 0.0, 0.0)
    free = count_free_rows(device, dtype)
    window = min(free // n, MAX_AUTO, T)
    if window < MIN_AUTO or sampler.compile:
        window = 1
    return Pace(window, 1 + n * (window - 1) / free, ALLOWED_LOSS * T)


def count_free_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows a pass has that takes twice as long as that of one row, about: it has to read all weights in any case."""
    if device.type != "cpu":
        return 512
    return 64 if dtype == torch.bfloat16 else 16


class Windows:
    """The grids of n samples, drawn window by window.

    `canvas` (n, T and what windows may reach beyond) has the codes that are final, those before `first` (n,), and then drafts.
    """

    def __init__(
        self,
        decode: WindowDecoder,
        codes: Tensor,
        known: Tensor,
        noise: GumbelNoise,
        sampler: Sampler,
        is_guided: bool,
        pace: Pace,
    ) -> None:
        self.decode, self.noise, self.sampler, self.is_guided = decode, noise, sampler, is_guided
        self.pace = pace
        self.n, self.T = codes.shape
        beyond = 2 * pace.window - 1  # of the last position
        self.canvas = F.pad(codes, (0, beyond))
        is_known = known.tolist()
        self.known = torch.tensor(is_known + beyond * [False], device=codes.device)
        self.end = max((t + 1 for t in range(self.T) if not is_known[t]), default=0)
        scales = [sampler.scale(t / self.T) for t in range(self.T + beyond)]
        self.scales = torch.tensor(scales, device=codes.device)
        self.result = codes.clone()
        self.samples = torch.arange(
            self.n, device=codes.device
        )  # the numbers of those on the canvas
        self.first = [0] * self.n
        self.passes = 0  # of all samples together

    def fill(self) -> Tensor:
        """The codes (n, T) with all that are not known drawn."""
        while self.end and self.first:
            finished = (self.n - len(self.first)) * self.end
            self.advance(self.pace.next_window((sum(self.first) + finished) / self.n))
            self.collect()
        return self.result

    def advance(self, window: int) -> None:
        """One pass: draw at `window` positions of each sample, and move on to the first code that is not final."""
        reach = 2 * window - 1  # with the drafts that the next window may need
        first = torch.tensor(self.first, device=self.canvas.device)
        places = first[:, None] + torch.arange(reach, device=first.device)
        drafts = self.canvas.gather(1, places)
        last = self.canvas.gather(1, (first - 1).clamp(min=0)[:, None])
        before = torch.cat([last, drafts[:, : window - 1]], 1)
        logits = self.predict(before, first, places[:, :window])
        noise = self.noise.at(self.first, reach)
        inside = self.sampler.draw_coupled(logits, noise[:, :window])
        # Nothing is predicted there yet, but neighbours are alike.
        beyond = self.sampler.draw_coupled(logits[:, -1:], noise[:, window:])
        codes = torch.where(self.known[places], drafts, torch.cat([inside, beyond], 1))
        self.canvas.scatter_(1, places, codes)
        agreed = self.count_agreed(codes[:, : window - 1], drafts[:, : window - 1])
        self.passes += sum(position < self.end for position in self.first)
        moved = zip(self.first, agreed, strict=True)
        self.first = [min(position + 1 + more, self.end) for position, more in moved]

    def count_agreed(self, codes: Tensor, drafts: Tensor) -> list[int]:
        """How many of each sample's drafts were read as they were drawn then, from the first on: the wait for the device."""
        counts: list[int] = (codes == drafts).long().cumprod(1).sum(1).tolist()
        return counts

    def predict(self, before: Tensor, first: Tensor, places: Tensor) -> Tensor:
        """The logits (n, W, K) at the places (n, W), guided if guidance is on."""
        end = max(self.first) + places.shape[1]
        if not self.is_guided:
            return self.decode(before, first, end)
        conditional, unconditional = self.decode(before.repeat(2, 1), first.repeat(2), end).chunk(2)
        return guided(conditional, unconditional, self.scales[places][..., None])

    def collect(self) -> None:
        """Take finished samples off the canvas, once a quarter of those on it are finished."""
        unfinished = [i for i, position in enumerate(self.first) if position < self.end]
        if len(unfinished) > 0.75 * len(self.first):
            return
        self.result[self.samples] = self.canvas[:, : self.T]
        rows = torch.tensor(unfinished, dtype=torch.int64, device=self.canvas.device)
        if unfinished:
            of_both = torch.cat([rows, rows + len(self.first)]) if self.is_guided else rows
            self.decode.select(of_both)
            self.noise.select(unfinished)
        self.samples, self.canvas = self.samples[rows], self.canvas[rows]
        self.first = [self.first[i] for i in unfinished]
