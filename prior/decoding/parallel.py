"""Many positions in one pass, with what is drawn distributed exactly as code by code: coupled speculative Jacobi decoding.

Code by code, the code at t is the largest sum of the logits at t, after truncation, and of Gumbel noise that only depends on the
sample and on t. So a grid is a function of its noise. A pass reads a window of drafts and draws at all of its positions by their
noise. A code is final if all codes before it were read as they are in the end: the first of a window always is, and each further
one up to the first draft that differs from the code drawn for it. The others are the next drafts, and since the noise is the
same, most of them stay as they are. So the codes are those of drawing code by code with the same noise, whatever the window, up to
the rounding of logits.

Song et al. 2021 (Jacobi iterations), Teng et al. 2024 (of drafts that are drawn), Daliri et al. 2024 (Gumbel noise as a coupling).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.sizes import Size
from prior.decoding.sampling import AUTO_PARALLEL, GumbelNoise, Sampler, guided

MIN_AUTO = 8  # codes of a grid for which `auto` chooses windows: shorter ones hardly pay
AUTO_WINDOW = 16  # positions: longer windows take as many passes, and shorter ones cost as much for few samples
OVERHEAD = 1.2  # of a pass that has no rows, in steps of drawing code by code: masks, and places of each sample's own
ALLOWED_LOSS = 0.05  # of the steps of drawing code by code, before windows that don't pay are ended


class WindowDecoder(Protocol):
    """The logits of windows of positions, one for each sample."""

    def __call__(self, before: Tensor, first: Tensor, end: int) -> Tensor:
        """The codes (n, W) before the positions first (n,) to first + W - 1 -> the logits (n, W, K) there.

        `end` is the largest first + W. At position 0 no code is read. Positions may lie beyond the last one, by up to W.
        """

    def select(self, samples: Tensor) -> None:
        """Keep these samples only, (m,) int64."""

    def begin_steps(self, t: int) -> Callable[[Tensor | None], Tensor]:
        """A function that goes on code by code from position t, before which all codes have been in a window and are final: it
        takes the codes (n,) before the next position, None at 0, and returns the logits (n, K) there."""

    def end_steps(self) -> None:
        """Go on in windows after the positions that the function of `begin_steps` was at."""


@dataclass
class Pace:
    """How many positions the next pass has: `window`, or 1 once windows have lost more than `allowed`: code by code from there.
    The codes before position `begin` are drawn code by code too: the first row has none above it to take drafts from.

    All is counted in steps of drawing code by code: `cost` is that of a pass, an estimate by its rows and not by a clock, so that
    a seed always draws by the same windows.
    """

    window: int
    cost: float
    allowed: float
    begin: int = 0
    spent: float = 0.0

    def next_window(self, drawn: float) -> int:
        """The positions of the next pass, when `drawn` codes of each sample are final, on average."""
        if self.spent > drawn + self.allowed:
            self.window = 1
        self.spent += self.cost
        return self.window


def choose_pace(
    sampler: Sampler, n: int, grid: Size, device: torch.device, dtype: torch.dtype
) -> Pace:
    """The windows of n samples, twice as many with guidance, whose products are in `dtype`; 1: code by code."""
    T = grid[0] * grid[1]
    if sampler.parallel != AUTO_PARALLEL:
        return Pace(min(int(sampler.parallel), T), 0.0, 0.0)
    free, window = count_free_rows(device, dtype), min(AUTO_WINDOW, T)
    if n * window > free or T < MIN_AUTO or sampler.compile:
        return Pace(1, 1.0, 0.0)
    first_row = grid[1] if grid[0] > 1 else 0
    return Pace(window, OVERHEAD + n * window / free, ALLOWED_LOSS * T, first_row)


def count_free_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows a pass may have that take as long as one row, about: it has to read all weights in any case."""
    if device.type != "cpu":
        return 512
    return 48 if dtype == torch.bfloat16 else 32


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
        self.is_known = is_known
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
        if self.pace.begin:
            self.draw_by_steps(min(self.pace.begin, self.end))
            self.pace.spent += max(self.first)
            self.decode.end_steps()
            self.collect()
        while self.end and self.first:
            finished = (self.n - len(self.first)) * self.end
            window = self.pace.next_window((sum(self.first) + finished) / self.n)
            if window == 1:
                self.draw_by_steps(self.end)
            else:
                self.advance(window)
            self.collect()
        return self.result

    def draw_by_steps(self, end: int) -> None:
        """Draw all codes before position `end` code by code, by the same noise. Steps are the same for all samples, so they begin
        with the sample that is least far, and leave the others' final codes as they are."""
        first = torch.tensor(self.first, device=self.canvas.device)
        begin = min(self.first)
        decode = self.decode.begin_steps(begin)
        for t in range(begin, end):
            before = self.canvas[:, t - 1].repeat(1 + self.is_guided) if t else None
            logits = decode(before)
            if self.is_known[t]:
                continue
            if self.is_guided:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, self.scales[t])
            noise = self.noise.at([max(t, position) for position in self.first], 1)[:, 0]
            drawn = self.sampler.draw_coupled(logits, noise)
            self.canvas[:, t] = torch.where(t < first, self.canvas[:, t], drawn)
        self.passes += len(self.first) * (end - begin)
        self.first = [max(position, end) for position in self.first]

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
