"""How codes are drawn from logits: temperature, top-k, top-p, min-p, guidance, and the random numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegrid.engine.defaults import read_defaults
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import Size, SizeSetting

REAL_SETTINGS = (
    "temperature", "top_p", "min_p", "guidance", "guidance_power", "choice_temperature", "remask"
)  # fmt: skip
WHOLE_SETTINGS = ("top_k", "steps", "corrector")
ORDERS = ("confidence", "random", "halton")
AUTO_PARALLEL = "auto"
MAX_WINDOW = 1024  # positions in one pass


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest of the logits (..., K) and set the others to -inf."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of codes, most likely first, with total probability p or more (Holtzman et al. 2020)."""
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= p  # the codes before it suffice
    return logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Keep codes at least `share` times as likely as the most likely one (Nguyen et al. 2024, section 3)."""
    least = logits.amax(-1, keepdim=True) + math.log(share)
    return logits.masked_fill(logits < least, -torch.inf)


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Logits moved away from those without a label (Ho & Salimans 2022, eq. 6, whose w is scale - 1)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass
class Sampler:
    """How codes are drawn from a prior's logits; conf/sampler/default.yaml has the defaults.

    The logits are divided by `temperature`, then truncated to the `top_k` most likely codes (0: all), then by `top_p`
    (1: all), then by `min_p` (0: all).

    With labels, `guidance` moves the logits before that: 1 not at all, 0 to those without a label. With `guidance_power`
    above 0, guidance starts at 1 and grows with that power of the share of positions already drawn.

    Priors that fill in masked codes, many in one step, take `steps` steps (0: the prior's default), in an `order` of ORDERS
    (None: the prior's own). The order of confidence adds Gumbel noise to log p, `choice_temperature` times, falling to 0 with
    the steps. After each step, `corrector` steps draw as many codes again, and in each step the share `remask` of as many
    codes as possible is masked again.

    `grid` replaces the prior's own grid: "16x24" or [16, 24], rows and columns, or one number for a square. Of the image in
    the file `init_image`, the upper `rows` rows of codes stay, or all codes outside the `region` [top, left, bottom, right],
    bottom and right exclusive.

    `compile` draws by torch.compile, with priors that are `stepwise`; the codes are the same up to rounding.

    `parallel` positions are drawn in one pass by priors that are `parallel`, from the same distribution as code by code
    (prior/decoding/parallel.py): 1 draws code by code, "auto" chooses. All windows draw the same codes, up to rounding, and
    "auto" draws those or, for many samples at once, those of 1.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    guidance: float
    guidance_power: float
    steps: int
    choice_temperature: float
    order: str | None
    corrector: int
    remask: float
    grid: str | SizeSetting | None
    init_image: str | None
    rows: int | None
    region: Sequence[int] | None
    compile: bool
    parallel: int | str

    @classmethod
    def unmodified(cls) -> "Sampler":
        """Samples of the prior's own distribution: temperature 1, no truncation, no guidance, the prior's own grid and steps.

        The order in which masked codes are filled in is not part of that distribution; it is as in conf/sampler.
        """
        return make_sampler(
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            guidance=1.0,
            guidance_power=0.0,
            steps=0,
            corrector=0,
            remask=0.0,
            grid=None,
            init_image=None,
            rows=None,
            region=None,
            compile=False,
            parallel=1,
        )

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.temperature <= 0:
            raise InputError(
                f"sampler.temperature={self.temperature} must be above 0; sampler.top_k=1 takes the most likely code"
            )
        if self.top_k < 0:
            raise InputError(f"sampler.top_k={self.top_k} must be at least 0; 0 keeps all codes")
        if not 0 < self.top_p <= 1:
            raise InputError(
                f"sampler.top_p={self.top_p} must be above 0 and at most 1; 1 keeps all codes"
            )
        if not 0 <= self.min_p <= 1:
            raise InputError(f"sampler.min_p={self.min_p} must be from 0 to 1; 0 keeps all codes")
        if self.guidance < 0 or self.guidance_power < 0:
            raise InputError(
                f"sampler.guidance={self.guidance} and sampler.guidance_power={self.guidance_power} must be at least 0; "
                "guidance=1 turns it off"
            )
        if self.steps < 0:
            raise InputError(
                f"sampler.steps={self.steps} must be at least 0; 0 leaves it to the prior"
            )
        self.check_order()
        self.check_parallel()
        if self.grid is not None:
            read_grid(self.grid)
        if self.rows is not None and self.region is not None:
            raise InputError(
                f"sampler.rows={self.rows} and sampler.region={self.region} exclude each other; leave one of them out"
            )
        if self.init_image is None and (self.rows is not None or self.region is not None):
            name, value = ("rows", self.rows) if self.region is None else ("region", self.region)
            raise InputError(
                f"sampler.{name}={value} selects what stays of an image; name that image with sampler.init_image=<file>"
            )
        if self.init_image is not None and self.rows is None and self.region is None:
            raise InputError(
                f"sampler.init_image={self.init_image} needs sampler.rows=4, the upper rows of codes that stay, or "
                "sampler.region=[top,left,bottom,right], the codes to redraw"
            )
        if self.init_image is not None and self.grid is not None:
            raise InputError(
                f"sampler.init_image={self.init_image} is completed on the prior's own grid; leave "
                f"sampler.grid={write_grid(self.grid)} out"
            )

    def check_numbers(self) -> None:
        """Raise InputError for a setting that is no number, or no whole number where one is needed."""
        kinds = dict.fromkeys(REAL_SETTINGS, Real) | dict.fromkeys(WHOLE_SETTINGS, Integral)
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                whole = "whole " if kind is Integral else ""
                raise InputError(f"sampler.{name}={value} must be a {whole}number")

    def check_order(self) -> None:
        """Raise InputError for settings of priors that fill in masked codes that are impossible for all of them."""
        if self.choice_temperature < 0:
            raise InputError(
                f"sampler.choice_temperature={self.choice_temperature} must be at least 0; 0 accepts the most confident codes"
            )
        if self.order is not None and self.order not in ORDERS:
            raise InputError(
                f"sampler.order={self.order} must be {', '.join(ORDERS[:-1])} or {ORDERS[-1]}, or null, the prior's own order"
            )
        if self.corrector < 0:
            raise InputError(
                f"sampler.corrector={self.corrector} must be at least 0, corrector steps after each step; 0 turns them off"
            )
        if not 0 <= self.remask <= 1:
            raise InputError(
                f"sampler.remask={self.remask} must be from 0 to 1, a share of the codes that can be masked again; 0 keeps all"
            )

    def check_parallel(self) -> None:
        """Raise InputError if `parallel` is neither "auto" nor a number of positions, or if it contradicts `compile`."""
        if self.parallel == AUTO_PARALLEL:
            return
        is_whole = isinstance(self.parallel, Integral) and not isinstance(self.parallel, bool)
        if not is_whole or not 1 <= int(self.parallel) <= MAX_WINDOW:
            raise InputError(
                f"sampler.parallel={self.parallel} must be auto or a whole number of positions from 1 to {MAX_WINDOW}; 1 draws "
                "code by code"
            )
        if self.parallel != 1 and self.compile:
            raise InputError(
                f"sampler.parallel={self.parallel} and sampler.compile=true exclude each other, since compiled steps have one "
                "position; leave one of them out"
            )

    def size(self, own: Size) -> Size:
        """The grid (h, w) to draw from a prior with the grid `own`."""
        if self.grid is None:
            return own
        h, w = read_grid(self.grid)
        if h < own[0] or w < own[1]:
            raise InputError(
                f"sampler.grid={write_grid(self.grid)} must be at least {own[0]}x{own[1]}, the grid that the prior learned, "
                "since larger ones are drawn in windows of that size"
            )
        return h, w

    def known(self, grid: Size) -> Tensor:
        """Which positions (h, w) of the grid, bool, keep the codes of `init_image`; none without an image."""
        known = torch.zeros(grid, dtype=torch.bool)
        if self.rows is not None:
            check_int("sampler.rows", self.rows, 0)
            if self.rows >= grid[0]:
                raise InputError(
                    f"sampler.rows={self.rows} must be less than the {grid[0]} rows of the grid, or nothing is drawn"
                )
            known[: self.rows] = True
        if self.region is not None:
            h, w = grid
            corners = list(self.region) if isinstance(self.region, Sequence) else []
            if len(corners) != 4 or any(not isinstance(corner, int) for corner in corners):
                raise InputError(
                    f"sampler.region={self.region} must be four whole numbers, [top,left,bottom,right] in codes"
                )
            top, left, bottom, right = corners
            if not (0 <= top < bottom <= h and 0 <= left < right <= w):
                raise InputError(
                    f"sampler.region={self.region} must lie within [0,0,{h},{w}], the grid, and its exclusive bottom and "
                    "right beyond its top and left"
                )
            known[:] = True
            known[top:bottom, left:right] = False
        return known

    def scale(self, drawn: float) -> float:
        """The guidance scale once a share `drawn` of the positions is drawn."""
        return 1 + (self.guidance - 1) * drawn**self.guidance_power

    def truncate(self, logits: Tensor) -> Tensor:
        """Logits (..., K) -> those of the distribution to draw from, float32: divided by the temperature, -inf where cut off."""
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p:
            logits = min_p(logits, self.min_p)
        return logits

    def draw_coupled(self, logits: Tensor, noise: Tensor) -> Tensor:
        """logits (..., K) and Gumbel noise (..., K) -> codes (...), the largest sums (Gumbel-max trick, Maddison et al. 2014).

        From two distributions the same noise draws the same code with a probability of (1 - d) / (1 + d) or more, d their
        distance in total variation; without a look at each other no draws can promise more (Daliri et al. 2024).
        """
        return (self.truncate(logits) + noise).argmax(-1)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """logits (n, K) and numbers (n,) uniform in [0, 1) -> codes (n,), by the inverse of the cumulative distribution."""
        cumulated = self.truncate(logits).softmax(-1).double().cumsum(-1)
        total = cumulated[:, -1:]
        target = uniform.double()[:, None] * total
        # Rounding must not lead past the last code that was not truncated.
        target = target.minimum(total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(cumulated, target, right=True)[:, 0]


def write_grid(grid: str | SizeSetting) -> str:
    """A grid of codes as sentences have it: 16x24, whatever it was given as."""
    if isinstance(grid, str) or not isinstance(grid, Sequence):
        return str(grid)
    return "x".join(map(str, grid))


def read_grid(grid: str | SizeSetting) -> Size:
    """sampler.grid, "16x24", [16, 24] or one number for a square, as rows and columns. Raises InputError for anything else."""
    sides = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", write_grid(grid))
    if sides is None:
        raise InputError(
            f"sampler.grid={write_grid(grid)} must be rows x columns of codes, such as 16x24 or [16,24], or one number for a square"
        )
    return int(sides[1]), int(sides[2] or sides[1])


def make_sampler(**settings: Any) -> Sampler:
    """A sampler with these settings, and those of conf/sampler/default.yaml for all others."""
    defaults = read_defaults("sampler/default").items()
    return Sampler(**{name: value for name, value in defaults if name != "_target_"} | settings)


class Numbers:
    """Random numbers for some samples of a seed, by their indices.

    Each sample has a stream of its own, so it does not depend on the batch in which it is drawn.
    """

    def __init__(
        self, seed: int, indices: Iterable[int], device: torch.device | str = "cpu"
    ) -> None:
        self.streams = [np.random.default_rng((seed, i)) for i in indices]
        self.device = device

    def uniform(self, *shape: int) -> Tensor:
        """The next numbers (n, *shape), uniform in [0, 1), float64."""
        numbers = np.stack([stream.random(shape) for stream in self.streams])
        return torch.from_numpy(numbers).to(self.device)

    def fork(self) -> list[np.random.Generator]:
        """A new stream for each sample. How far it is read changes none of the next numbers."""
        return [np.random.default_rng(stream.integers(2**63)) for stream in self.streams]


class GumbelNoise:
    """Gumbel noise for each code at each position of some samples; the same for a position whenever it is asked for.

    A sample's noise is drawn from its stream in the order of the positions, a block at a time, when it is first needed; two
    blocks are in memory. So positions may be asked for again until others a block further on have been.
    """

    def __init__(
        self, streams: Sequence[np.random.Generator], T: int, K: int, window: int, device: Any
    ) -> None:
        """For `streams` (n) and windows of at most `window` positions."""
        self.streams, self.T, self.device = list(streams), T, device
        # Each block costs a call per sample; all blocks together should stay in the processor's cache.
        self.block = max(window, min(16, T, max(1, 2**17 // (K * max(1, len(streams))))))
        self.drawn = [0] * len(streams)  # positions
        self.blocks = torch.zeros(len(streams), 2 * self.block, K)

    def at(self, first: Sequence[int], window: int) -> Tensor:
        """The noise (n, window, K) of the positions first[i] to first[i] + window - 1; any numbers beyond the last position."""
        ends = [min(position + window, self.T) for position in first]
        while late := [i for i, drawn in enumerate(self.drawn) if drawn < ends[i]]:
            self._draw([i for i in late if self.drawn[i] == self.drawn[late[0]]])
        if window == 1 and first.count(first[0]) == len(first):
            noise = self.blocks[:, first[0] % (2 * self.block), None].clone()
        else:
            places = torch.tensor(first)[:, None] + torch.arange(window)
            rows = torch.arange(len(first))[:, None]
            noise = self.blocks[rows, places % (2 * self.block)]
        return noise.to(self.device)

    def _draw(self, samples: Sequence[int]) -> None:
        """Draw the next block of these samples, of which all have as many, in place of their last but one.

        Exponential times first, of 31 random bits each, two in each number of a stream: in half of the time that numpy's own
        take, and as finely spaced where they are short, which decides what is drawn: their logarithms are the noise.
        """
        first = self.drawn[samples[0]]
        n, K = min(self.block, self.T - first), self.blocks.shape[-1]
        pairs = np.empty((len(samples), n, (K + 1) // 2), np.uint64)
        for i, own in zip(samples, pairs, strict=True):
            own[:] = self.streams[i].bit_generator.random_raw(own.shape)
            self.drawn[i] += n
        bits = torch.from_numpy(pairs.view(np.int32)).bitwise_and_(2**31 - 1)
        share = bits.float().add_(0.5).mul_(-(2.0**-31)).clamp_(min=2.0**-24 - 1)
        noise = share.log1p_().neg_().log_().neg_()
        place = first % (2 * self.block)
        self.blocks[list(samples), place : place + n] = noise[..., :K]

    def select(self, samples: Sequence[int]) -> None:
        """Keep the noise of these samples only."""
        self.streams = [self.streams[i] for i in samples]
        self.drawn = [self.drawn[i] for i in samples]
        self.blocks = self.blocks[list(samples)]
