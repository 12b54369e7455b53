"""Large pictures through a network tile by tile, in memory that does not grow with the picture.

A tile lacks what lies outside of it. Where a network reads no further than a known distance, as convolutions do, tiles overlap by
it, and the result is that of the whole picture up to rounding. Attention and normalisations over all positions (GroupNorm), which
the networks of this program have, read the whole picture. There each tile is a picture of its own, as large as those of training
or larger, and neighbours are blended where they overlap, with ramps that leave no edge. Statistics from other tiles would not
help: those of one pass over all tiles do not fit each other, and in deep networks their errors grow from layer to layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import write_size
from vqgan.networks.base import ImageDecoder, ImageEncoder

AUTOMATIC = "auto"
AUTO_TILE = 512  # pixels of a side, or those of the images in training if these are larger
LEAST_TILE = 4  # codes of a side
LEAST_CORE = (
    1 / 4
)  # of a tile's side where tiles agree exactly; where that leaves less, they are blended
BLENDED = 1 / 8  # of a tile's side, on each side of a core, where tiles are blended

Network = Callable[[Tensor], Tensor]


class Tiled(Protocol):
    """What tiling asks of a tokenizer; see vqgan/tokenizer.py."""

    encoder: ImageEncoder
    decoder: ImageDecoder


def run_by_tiles(
    tokenizer: Tiled, run: Network, x: Tensor, units: tuple[int, int], tile: int | str | None
) -> Tensor:
    """run(x), the encoding or the decoding of a tokenizer: by tiles for pictures with sides longer than `tile` pixels.

    `units` are the positions a code in each direction, of x and of the output. Raises InputError for a tile that can't work, and
    for networks that serve images of one size alone.
    """
    if tile is None:
        return run(x)
    encoder = tokenizer.encoder
    if not encoder.is_spatial:
        raise InputError(
            f"tile={tile}: codes of {type(encoder).__name__} are not codes of a place in the image; leave tile out"
        )
    codes = choose_tile(tokenizer, tile) // encoder.f
    if not len(x) or max(x.shape[-2:]) <= codes * units[0]:
        return run(x)
    for network in (encoder, tokenizer.decoder):
        if not network.sized_settings:
            raise InputError(
                f"tile={tile}: {type(network).__name__} serves images of {write_size(encoder.image_size)} pixels alone; "
                "leave tile out"
            )
    return Tiling(run, units, codes)(x)


def choose_tile(tokenizer: Tiled, tile: int | str) -> int:
    """The pixels of a tile's side, a multiple of f. Raises InputError for a tile that can't work."""
    f = tokenizer.encoder.f
    if tile == AUTOMATIC:
        return max(AUTO_TILE // f, *tokenizer.encoder.grid, LEAST_TILE) * f
    if isinstance(tile, str):
        raise InputError(f"tile={tile} must be {AUTOMATIC}, or pixels of a side")
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


def plan_spans(side: int, tile: int, margin: int) -> list[Span]:
    """Spans of `tile` codes that cover a side and overlap by twice the margin at least; one span if the side is no longer."""
    if side <= tile:
        return [Span(0, side, 0, side)]
    count = -(-(side - 2 * margin) // (tile - 2 * margin))
    starts = [round(i * (side - tile) / (count - 1)) for i in range(count)]
    borders = [(start + before + tile) // 2 for before, start in pairwise(starts)]
    cores = zip([0, *borders], [*borders, side], strict=True)
    return [Span(start, start + tile, *core) for start, core in zip(starts, cores, strict=True)]


def plan_tiles(grid: Sequence[int], tile: int, margin: int) -> list[Tile]:
    """Tiles of `tile` codes a side that cover a grid of codes."""
    rows, columns = (plan_spans(side, tile, margin) for side in grid)
    return [Tile(row, column) for row in rows for column in columns]


def measure_reach(run: Network, part: Tensor, units: tuple[int, int]) -> int | None:
    """How many codes beyond a code its values reach in a network's output, by NaN in place of one code of the input `part`.

    None if they reach the edge of the part, as they do through attention and through normalisations over all positions.
    """
    unit_in, unit_out = units
    grid = [side // unit_in for side in part.shape[-2:]]
    centre = [side // 2 for side in grid]
    part = part[:1].clone()
    rows, columns = (slice(c * unit_in, (c + 1) * unit_in) for c in centre)
    part[..., rows, columns] = torch.nan
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
        """The network's output for one sample (1, C, H, W)."""
        unit_in, unit_out = self.units
        grid = [side // unit_in for side in x.shape[-2:]]
        margin, is_exact = self.choose_margin(x, grid)
        whole: Tensor | None = None
        for tile in plan_tiles(grid, self.tile, margin):
            y = self.run(tile.cut(x, unit_in))
            if whole is None:
                whole = y.new_zeros(*y.shape[:2], *(side * unit_out for side in grid))
            ramp = 0 if is_exact else margin
            rows, columns = (weigh_span(s, unit_out, ramp).to(y) for s in (tile.rows, tile.columns))
            tile.cut(whole, unit_out).addcmul_(y, rows[:, None] * columns)
        assert whole is not None
        return whole

    def choose_margin(self, x: Tensor, grid: Sequence[int]) -> tuple[int, bool]:
        """By how many codes tiles reach beyond their cores, and whether what lies beyond that changes no core."""
        sides = [min(side, self.tile) for side in grid]
        starts = [(side - n) // 2 for side, n in zip(grid, sides, strict=True)]
        spans = [
            Span(start, start + n, start, start + n) for start, n in zip(starts, sides, strict=True)
        ]
        reach = measure_reach(self.run, Tile(*spans).cut(x, self.units[0]), self.units)
        if reach is not None and self.tile - 2 * reach >= self.tile * LEAST_CORE:
            return reach, True
        return max(round(self.tile * BLENDED), 1), False
