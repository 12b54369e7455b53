"""Fits the built-in shapes to regions of an image by search alone: no network, no gradients.

A shape's free parameters are its kind, radius, aspect, angle and place, in the ranges that data.shapes draws from.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from codegrid.data.shapes import CENTRES, MIN_ASPECT, RADIUS, SHAPES

FIT_SIDE = 64  # pixels of the images that shapes are fitted in
REACH = 40  # pixels from a shape's centre within which all of it lies
CELLS = FIT_SIDE // 2  # the coarse search runs at half the resolution
PADDED = 48  # cells of a side with as much border as shapes reach over it
LEAST_COMMON = 0.8  # of a region that a shape must cover to be a candidate
# Where centres lie: the borders of cells, counted from the edge of the image.
CENTRE_CELLS = np.arange(math.ceil(CELLS * CENTRES[0]), math.floor(CELLS * CENTRES[1]) + 1)
# (columns) of a candidate: radius, aspect, angle, column, row
LOWEST = np.array([RADIUS[0], MIN_ASPECT, -np.inf, FIT_SIDE * CENTRES[0], FIT_SIDE * CENTRES[0]])
HIGHEST = np.array([RADIUS[1], 1.0, np.inf, FIT_SIDE * CENTRES[1], FIT_SIDE * CENTRES[1]])
FIRST_STEPS = np.array(
    [1.5, 0.1, 0.12, 1.2, 1.2]
)  # standard deviations of the fine search's first round

MAX_STARTS = 16  # candidates of the coarse search that the fine search begins with
MAX_STARTS_PER_KIND = 5
TRIALS = 96  # candidates of a round of the fine search
ROUNDS = 10
SHRINK = 0.75  # steps of a round relative to those of the round before

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ShapeFit:
    """A shape and its overlap (intersection over union) with the region that it was fitted to.

    `kind` is its place in data.shapes.SHAPES; `parameters` are radius, aspect, angle in radians, and the column and the row of
    its centre, in pixels.
    """

    kind: int
    parameters: tuple[float, float, float, float, float]
    iou: float

    @property
    def name(self) -> str:
        """rectangle, triangle, disk, oval or star."""
        return SHAPES[self.kind].__name__.lstrip("_")

    def mask(self, scale: int = 1) -> Mask:
        """What it covers of an image, or of one that is `scale` times as large: (scale * FIT_SIDE, scale * FIT_SIDE)."""
        side = scale * FIT_SIDE
        middles = ((np.arange(side) + 0.5) / scale - 0.5).astype(np.float32)  # of pixels
        candidate = np.array([self.parameters], np.float32)
        columns, rows = np.tile(middles, side), np.repeat(middles, side)
        return covers(self.kind, candidate, columns, rows).reshape(side, side)


def covers(kind: int, candidates: Floats, columns: Floats, rows: Floats) -> Mask:
    """Which pixels (p,) lie inside which candidates (n, 5) of a kind, (n, p)."""
    radius, aspect, angle, left, top = (column[:, None] for column in candidates.T)
    cos, sin = np.cos(angle), np.sin(angle)
    u = cos * columns + (sin * rows - (cos * left + sin * top))
    v = cos * rows - (sin * columns + (cos * top - sin * left))
    return SHAPES[kind](u, v, radius, aspect)


def measure_overlap(region: Mask, free: Mask, shape: Mask) -> float:
    """Intersection over union of a region and of the part of a shape that is free to be seen, all (FIT_SIDE, FIT_SIDE)."""
    visible = shape & free
    return float(np.sum(visible & region) / np.sum(visible | region))


@dataclass(frozen=True)
class ShapeBank:
    """Shapes at coarse steps of kind, radius, aspect and angle, for a search over all places by Fourier transforms.

    `kinds` (n,), `settings` (n, 3): radius, aspect, angle; `areas` (n,) in cells; `spectra` (n, PADDED, PADDED // 2 + 1).
    """

    kinds: NDArray[np.int64]
    settings: Floats
    areas: Floats
    spectra: NDArray[np.complex64]


def list_stencils() -> list[tuple[int, float, float, float]]:
    """Kind, radius, aspect and angle of the shapes of the bank, without those that are equal to another by symmetry."""
    radii = np.geomspace(RADIUS[0] * 1.05, RADIUS[1] * 0.95, 5)
    disks = np.geomspace(RADIUS[0] * (0.5 + 0.5 * MIN_ASPECT), RADIUS[1], 9)
    aspects = {0: (0.4, 0.55, 0.72, 0.92), 1: (0.5, 0.9), 3: (0.5, 0.85), 4: (1.0,)}
    period = {0: np.pi, 1: 2 * np.pi, 3: np.pi, 4: 0.4 * np.pi}
    angles = {0: 12, 1: 18, 3: 12, 4: 6}
    bank = []
    for disk in disks:  # a small one is a larger radius with a lower aspect
        radius = max(disk, RADIUS[0])
        bank.append((2, float(radius), float(2 * disk / radius - 1), 0.0))
    for kind in aspects:
        for radius in radii:
            for aspect in aspects[kind]:
                for turn in range(angles[kind]):
                    angle = turn * period[kind] / angles[kind]
                    bank.append((kind, float(radius), aspect, float(angle)))
    return bank


@cache
def shape_bank() -> ShapeBank:
    """The bank, computed once."""
    listed = list_stencils()
    kinds = np.array([kind for kind, *_ in listed])
    settings = np.array([rest for _, *rest in listed], np.float32)
    side = 2 * REACH
    rows, columns = np.indices((side, side), np.float32) - (side - 1) / 2
    stencils = np.empty((len(listed), side, side), np.float32)
    for i, kind in enumerate(kinds):
        candidate = np.array([[*settings[i], 0, 0]], np.float32)
        stencils[i] = covers(kind, candidate, columns.ravel(), rows.ravel()).reshape(side, side)
    cells = to_cells(stencils)
    spectra = scipy.fft.rfft2(cells, (PADDED, PADDED)).conj()
    return ShapeBank(kinds, settings, cells.sum((1, 2)), spectra)


def to_cells(masks: NDArray[np.generic]) -> Floats:
    """Masks (..., h, w) at half the resolution: the mean of each cell of 2x2 pixels."""
    *rest, h, w = masks.shape
    cells: Floats = masks.reshape(*rest, h // 2, 2, w // 2, 2).mean((-3, -1), dtype=np.float32)
    return cells


def correlate(spectrum: NDArray[np.complex64], rows: NDArray[np.intp]) -> Floats:
    """The cells that shapes of the bank (these rows, n) share with a mask of this spectrum, (n, len(CENTRE_CELLS) ** 2).

    The second axis counts the places of the centre, row by row.
    """
    offsets = CENTRE_CELLS - REACH // 2  # of a stencil's corner
    # Rows first, of which only those in range go through the second transform.
    products = scipy.fft.ifft(spectrum * shape_bank().spectra[rows], axis=1, overwrite_x=True)
    shared: Floats = scipy.fft.irfft(products[:, offsets], PADDED, overwrite_x=True)[..., offsets]
    return shared.reshape(len(rows), -1)


def search_coarsely(region: Mask, free: Mask) -> list[tuple[int, Floats]]:
    """The best candidates of the bank at any place: kind and parameters (5,), the best first."""
    bank = shape_bank()
    area = region.sum() / 4
    spectra = scipy.fft.rfft2(to_cells(np.stack([region, free])), (PADDED, PADDED))
    rows = np.flatnonzero(bank.areas >= LEAST_COMMON * min(area, bank.areas.max()))
    common = correlate(spectra[0], rows)
    # A shape must cover most of the region, wherever it is best.
    covering = common.max(1) >= LEAST_COMMON * common.max()
    rows, common = rows[covering], common[covering]
    iou = common / (area + correlate(spectra[1], rows) - common)
    places = iou.argmax(1)
    best = iou[np.arange(len(rows)), places]
    chosen: list[tuple[int, Floats]] = []
    counts = np.zeros(len(SHAPES), int)
    for i in best.argsort()[::-1]:
        kind = int(bank.kinds[rows[i]])
        if counts[kind] == MAX_STARTS_PER_KIND:
            continue
        counts[kind] += 1
        row, column = divmod(int(places[i]), len(CENTRE_CELLS))
        centre = [2.0 * CENTRE_CELLS[k] - 0.5 for k in (column, row)]
        chosen.append((kind, np.array([*bank.settings[rows[i]], *centre], np.float32)))
        if len(chosen) == MAX_STARTS:
            break
    return chosen


def fit_shape(region: Mask, free: Mask, sufficient: float) -> ShapeFit:
    """The shape that overlaps most with a region, both masks (FIT_SIDE, FIT_SIDE).

    A shape's pixels that are not `free`, which nearer shapes cover, don't count; the region must be free. The search ends at
    the first shape with a `sufficient` overlap, and is the same for the same region.
    """
    rows, columns = (each.astype(np.float32) for each in np.nonzero(region))
    other_rows, other_columns = (each.astype(np.float32) for each in np.nonzero(free & ~region))
    columns, rows = np.concatenate([columns, other_columns]), np.concatenate([rows, other_rows])
    area = int(region.sum())

    def overlaps_of(kind: int, candidates: Floats) -> Floats:
        inside = covers(kind, candidates, columns, rows)
        common = np.count_nonzero(inside[:, :area], 1)
        overlaps: Floats = common / (area + np.count_nonzero(inside[:, area:], 1))
        return overlaps

    generator = np.random.default_rng(0)
    starts = search_coarsely(region, free)
    scores = [float(overlaps_of(kind, centre[None])[0]) for kind, centre in starts]
    steps = FIRST_STEPS
    for _ in range(ROUNDS):
        if max(scores) >= sufficient:
            break
        trials = TRIALS // len(starts)
        for i, (kind, centre) in enumerate(starts):
            moves = generator.standard_normal((trials, 5)) * steps
            candidates = (centre + moves).clip(LOWEST, HIGHEST).astype(np.float32)
            overlaps = overlaps_of(kind, candidates)
            best = int(overlaps.argmax())
            if overlaps[best] > scores[i]:
                starts[i], scores[i] = (kind, candidates[best]), float(overlaps[best])
        # The better half goes on, with more trials each.
        order = np.argsort(scores)[::-1][: max(2, (len(starts) + 1) // 2)]
        starts, scores = [starts[i] for i in order], [scores[i] for i in order]
        steps = steps * SHRINK
    best = int(np.argmax(scores))
    kind, parameters = starts[best]
    return ShapeFit(kind, tuple(map(float, parameters)), scores[best])  # type: ignore[arg-type]
