"""Large pictures through a network tile by tile, in memory that does not grow with the picture.

What a tile lacks is what lies outside of it. Convolutions read a known distance beyond a position, so tiles that overlap by it
agree to the rounding. Normalisations over all positions (GroupNorm) read the whole picture: their means and variances are
estimated in a pass over all tiles and are then the same for all of them, so no tile differs from its neighbour. Attention, and
whatever else reads further than the tiles overlap, sees its own tile alone; there the overlaps are blended.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import write_size
from vqgan.networks.base import ImageDecoder, ImageEncoder

AUTO = "auto"
AUTO_TILE = 512  # pixels of a side, or those of the images in training if these are larger
LEAST_TILE = 4  # codes of a side
LEAST_CORE = (
    1 / 4
)  # of a tile's side where tiles agree exactly; where that leaves less, they are blended
BLENDED = 1 / 8  # of a tile's side, on each side of a core, where tiles are blended
PASSES = 2  # over all tiles that estimate the statistics of the normalisations

Network = Callable[[Tensor], Tensor]


class Tiled(Protocol):
    """What tiling asks of a tokenizer; see vqgan/tokenizer.py."""

    encoder: ImageEncoder
    decoder: ImageDecoder

    @property
    def f(self) -> int: ...


def run_by_tiles(
    tokenizer: Tiled, run: Network, x: Tensor, units: tuple[int, int], tile: int | str | None
) -> Tensor:
    """run(x), the encoding or the decoding of a tokenizer: by tiles for pictures with sides longer than `tile` pixels.

    `units` are the positions a code in each direction, of x and of the output. Raises InputError for a tile that can't work, and
    for networks that serve images of one size alone.
    """
    if tile is None:
        return run(x)
    codes = choose_tile(tokenizer, tile) // tokenizer.f
    if max(x.shape[-2:]) <= codes * units[0]:
        return run(x)
    encoder = tokenizer.encoder
    if tuple(n * tokenizer.f for n in encoder.grid) != encoder.image_size:
        raise InputError(
            f"tile={tile}: codes of {type(encoder).__name__} are not codes of a place in the image; leave tile out"
        )
    for network in (encoder, tokenizer.decoder):
        if not network.sized_settings:
            raise InputError(
                f"tile={tile}: {type(network).__name__} serves images of {write_size(encoder.image_size)} pixels alone; "
                "leave tile out"
            )
    return Tiling(run, units, codes)(x)


def choose_tile(tokenizer: Tiled, tile: int | str) -> int:
    """The pixels of a tile's side, a multiple of f. Raises InputError for a tile that can't work."""
    f = tokenizer.f
    if tile == AUTO:
        return max(AUTO_TILE // f, *tokenizer.encoder.grid, LEAST_TILE) * f
    if isinstance(tile, str):
        raise InputError(f"tile={tile} must be {AUTO}, or pixels of a side")
    check_int("tile", tile, 1, "pixel")
    if tile < LEAST_TILE * f:
        raise InputError(
            f"tile={tile} must be at least {LEAST_TILE * f} pixels, {LEAST_TILE} codes of f={f}"
        )
    return tile // f * f


@dataclass(frozen=True)
class Span:
    """A stretch of rows or columns, in codes: what a tile reads, and the core of it that no other tile has."""

    start: int
    stop: int
    core_start: int
    core_stop: int


@dataclass(frozen=True)
class Tile:
    rows: Span
    columns: Span

    def cut(self, x: Tensor, unit: int) -> Tensor:
        """The tile's part of a map with `unit` positions a code in each direction."""
        rows, columns = (slice(s.start * unit, s.stop * unit) for s in (self.rows, self.columns))
        return x[..., rows, columns]

    def cut_core(self, x: Tensor) -> Tensor:
        """The core of a map of this tile, of whatever resolution."""
        cuts = []
        for span, side in zip((self.rows, self.columns), x.shape[-2:], strict=True):
            ends = (span.core_start - span.start, span.core_stop - span.start)
            cuts.append(slice(*(end * side // (span.stop - span.start) for end in ends)))
        return x[..., cuts[0], cuts[1]]


def plan_spans(side: int, tile: int, margin: int) -> list[Span]:
    """Spans of `tile` codes that cover a side and overlap by twice the margin at least; one span if the side is no longer."""
    if side <= tile:
        return [Span(0, side, 0, side)]
    count = -(-(side - 2 * margin) // (tile - 2 * margin))
    starts = [round(i * (side - tile) / (count - 1)) for i in range(count)]
    borders = [
        (start + before + tile) // 2 for before, start in zip(starts, starts[1:], strict=False)
    ]
    cores = zip([0, *borders], [*borders, side], strict=True)
    return [Span(start, start + tile, *core) for start, core in zip(starts, cores, strict=True)]


def plan_tiles(grid: Sequence[int], tile: int, margin: int) -> list[Tile]:
    """Tiles of `tile` codes a side that cover a grid of codes."""
    rows, columns = (plan_spans(side, tile, margin) for side in grid)
    return [Tile(row, column) for row in rows for column in columns]


class SharedNorms(TorchFunctionMode):
    """Runs tiles with the same means and variances in each group normalisation, those of the whole picture.

    The n-th normalisation that a network calls is the same one in each tile. `sums` are those of the pass that runs: positions,
    means and mean squares times positions, (B, groups) each, of the tiles' cores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[tuple[Tensor, Tensor]] | None = None  # mean and variance of each
        self.sums: list[tuple[int, Tensor, Tensor]] = []
        self._tile: Tile | None = None  # whose statistics are added up
        self._number = 0

    @contextmanager
    def run(self, tile: Tile | None = None) -> Iterator[None]:
        """Inside, a network runs on one tile; with `tile` its statistics are added to the sums."""
        self._tile, self._number = tile, 0
        with self:
            yield

    def settle(self) -> None:
        """Use the statistics of the tiles that ran since the last call from now on."""
        self.moments = [
            ((total / n).float(), (squares / n - (total / n).square()).clamp(min=0).float())
            for n, total, squares in self.sums
        ]
        self.sums = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            return self._normalise(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _normalise(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        number, self._number = self._number, self._number + 1
        if self._tile is not None:
            self._add(number, measure_moments(self._tile.cut_core(x), num_groups))
        if self.moments is None:
            _, mean, square = measure_moments(x, num_groups)
            mean, variance = mean.float(), (square - mean.square()).float()
        else:
            mean, variance = self.moments[number]
        return apply_moments(x, mean, variance, weight, bias, eps)

    def _add(self, number: int, moments: tuple[int, Tensor, Tensor]) -> None:
        n, mean, square = moments
        if number == len(self.sums):
            self.sums.append((n, n * mean, n * square))
        else:
            before, total, squares = self.sums[number]
            self.sums[number] = (before + n, total + n * mean, squares + n * square)


def measure_moments(x: Tensor, num_groups: int) -> tuple[int, Tensor, Tensor]:
    """The positions of a map (B, C, h, w), and the mean and mean square of each group of channels, (B, groups) float64."""
    rows = x.reshape(len(x), num_groups, -1)
    variance, mean = torch.var_mean(rows.float(), 2, correction=0)
    mean = mean.double()
    return rows.shape[2], mean, variance.double() + mean.square()


def apply_moments(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Group normalisation of x (B, C, h, w) by a mean and a variance of each group, (B, groups)."""
    width = x.shape[1] // mean.shape[1]
    scale = (variance + eps).rsqrt().repeat_interleave(width, 1)
    if weight is not None:
        scale = scale * weight.float()
    shift = -mean.repeat_interleave(width, 1) * scale
    if bias is not None:
        shift = shift + bias.float()
    return torch.addcmul(
        shift[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype)
    )


def measure_reach(
    run: Network, part: Tensor, units: tuple[int, int], norms: SharedNorms
) -> int | None:
    """How many codes beyond a code its values reach in a network's output, by NaN in place of one code of the input `part`.

    None if they reach the edge of the part, as attention's do.
    """
    unit_in, unit_out = units
    grid = [side // unit_in for side in part.shape[-2:]]
    centre = [side // 2 for side in grid]
    part = part[:1].clone()
    rows, columns = (slice(c * unit_in, (c + 1) * unit_in) for c in centre)
    part[..., rows, columns] = torch.nan
    with norms.run():
        changed = run(part).isnan().flatten(0, 1).any(0)
    reach = 0
    for axis, (c, side) in enumerate(zip(centre, grid, strict=True)):
        places = changed.any(1 - axis).nonzero()[:, 0] // unit_out
        first, last = int(places.min()), int(places.max())
        if first == 0 or last == side - 1:
            return None
        reach = max(reach, c - first, last - c)
    return reach


def weigh_span(span: Span, unit: int, ramp: int) -> Tensor:
    """How much each position of a tile counts in one direction: 1 in the core, with ramps of so many codes over its ends, which
    complement those of the neighbours."""
    places = torch.arange(span.start * unit, span.stop * unit) + 0.5
    weights = torch.ones(len(places))
    for border, sign, is_inner in (
        (span.core_start, 1, span.core_start > span.start),
        (span.core_stop, -1, span.core_stop < span.stop),
    ):
        if is_inner:
            beyond = sign * (places - border * unit)
            weights *= (beyond / (ramp * unit) + 0.5).clamp(0, 1) if ramp else (beyond > 0).float()
    return weights


@dataclass(frozen=True)
class Tiling:
    """A network and how it takes maps by tiles.

    run      the network
    units    positions a code in each direction, of its input and of its output
    tile     codes of a tile's side
    """

    run: Network
    units: tuple[int, int]
    tile: int

    def __call__(self, x: Tensor) -> Tensor:
        """The network's output for x (B, C, H, W), of which it takes a tile of one sample at a time."""
        return torch.cat([self.run_sample(sample[None]) for sample in x])

    def run_sample(self, x: Tensor) -> Tensor:
        unit_in, unit_out = self.units
        grid = [side // unit_in for side in x.shape[-2:]]
        norms = SharedNorms()
        margin, is_exact = self.choose_margin(x, grid, norms)
        tiles = plan_tiles(grid, self.tile, margin)
        has_norms, norms.moments = bool(norms.moments), None
        for _ in range(PASSES if has_norms else 0):
            for tile in tiles:
                with norms.run(tile):
                    self.run(tile.cut(x, unit_in))
            norms.settle()
        whole: Tensor | None = None
        for tile in tiles:
            with norms.run():
                y = self.run(tile.cut(x, unit_in))
            if whole is None:
                whole = y.new_zeros(*y.shape[:2], *(side * unit_out for side in grid))
            ramp = 0 if is_exact else margin
            rows, columns = (weigh_span(s, unit_out, ramp).to(y) for s in (tile.rows, tile.columns))
            tile.cut(whole, unit_out).addcmul_(y, rows[:, None] * columns)
        assert whole is not None
        return whole

    def choose_margin(self, x: Tensor, grid: Sequence[int], norms: SharedNorms) -> tuple[int, bool]:
        """By how many codes tiles reach beyond their cores, and whether what lies beyond that changes no core."""
        sides = [min(side, self.tile) for side in grid]
        starts = [(side - n) // 2 for side, n in zip(grid, sides, strict=True)]
        spans = [
            Span(start, start + n, start, start + n) for start, n in zip(starts, sides, strict=True)
        ]
        middle = Tile(*spans)
        part = middle.cut(x, self.units[0])
        with norms.run(middle):
            self.run(part)
        norms.settle()
        reach = measure_reach(self.run, part, self.units, norms)
        if reach is not None and self.tile - 2 * reach >= self.tile * LEAST_CORE:
            return reach, True
        return max(round(self.tile * BLENDED), 1), False
