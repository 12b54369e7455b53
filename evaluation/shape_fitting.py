"""Fits the built-in shapes to regions of an image by search alone: no network, no gradients.

A shape's free parameters are its kind, radius, aspect, angle and place, in the ranges that data.shapes draws from.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from codegrid.data.shapes import CENTRES, MIN_ASPECT, RADIUS, SHAPES, STAR_NOTCH

FIT_SIDE = 64  # pixels of the images that shapes are fitted in
REACH = 40  # pixels from a shape's centre within which all of it lies
CELLS = FIT_SIDE // 2  # the coarse search runs at half the resolution
PADDED = 48  # cells of a side with as much border as shapes reach over it
SHAPES_AT_ONCE = 96  # shapes of the bank that are transformed together, so that they stay in the processor's cache
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

STAR = 4  # in SHAPES
EDGE = 0.05  # square pixels by which rounding moves no pixel over a star's edge: a hundred times what it does
# The distance from its centre, in radii, within which all of a shape lies, in the order of SHAPES; and pixels for rounding.
REACH_OF_KIND = np.array([math.sqrt(2), math.sqrt(2), 1, 1, 1])
SLACK = 1

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
        return covers(self.kind, np.array([self.parameters], np.float32), middles, middles)[0]


def covers(kind: int, candidates: Floats, columns: Floats, rows: Floats) -> Mask:
    """Which pixels of the grid of these rows (h,) and columns (w,) lie inside which candidates (n, 5) of a kind, (n, h, w)."""
    radius, aspect, angle, left, top = (column[:, None, None] for column in candidates.T)
    rows = rows[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    u = cos * columns + (sin * rows - (cos * left + sin * top))
    v = cos * rows - (sin * columns + (cos * top - sin * left))
    if kind == STAR:
        return covers_star(u, v, radius, aspect)
    return SHAPES[kind](u, v, radius, aspect)


def covers_star(u: Floats, v: Floats, radius: Floats, aspect: Floats) -> Mask:
    """What SHAPES[STAR] returns, to the bit, without its angles but for pixels that lie on the edge; u and v (n, h, w).

    Mirroring at the lines between two tips and at those through the tips brings each pixel beside the tip at u = 0.
    """
    half = np.float32(np.pi / 5)
    cos, sin = np.cos(half), np.sin(half)
    across, along = np.abs(u), v
    for _ in range(2):
        beyond = np.maximum(across * cos - along * sin, 0) * 2
        across, along = np.abs(across - beyond * cos), along + beyond * sin
    notch = STAR_NOTCH * radius
    inwards = (radius - along) * (notch * sin) - across * (radius - notch * cos)
    inside: Mask = inwards > 0
    on_edge = np.abs(inwards) < EDGE
    if on_edge.any():
        r, a = (np.broadcast_to(each, u.shape)[on_edge] for each in (radius, aspect))
        inside[on_edge] = SHAPES[STAR](u[on_edge], v[on_edge], r, a)
    return inside


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
    middles = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
    stencils = np.empty((len(listed), side, side), np.float32)
    for i, kind in enumerate(kinds):
        candidate = np.array([[*settings[i], 0, 0]], np.float32)
        stencils[i] = covers(kind, candidate, middles, middles)[0]
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
    offsets = (CENTRE_CELLS - REACH // 2) % PADDED  # of a stencil's corner
    bank = shape_bank()
    shared = np.empty((len(rows), len(offsets), len(offsets)), np.float32)
    for first in range(0, len(rows), SHAPES_AT_ONCE):
        part = slice(first, first + SHAPES_AT_ONCE)
        products = spectrum * bank.spectra[rows[part]]
        # Rows first, of which only those in range go through the second transform.
        products = scipy.fft.ifft(products, axis=1, overwrite_x=True).take(offsets, 1)
        shared[part] = scipy.fft.irfft(products, PADDED, overwrite_x=True).take(offsets, 2)
    return shared.reshape(len(rows), -1)


@cache
def uncovered_areas() -> Floats:
    """What `correlate` returns for all shapes of the bank and a mask of the whole image, computed once."""
    whole = np.ones((FIT_SIDE, FIT_SIDE), bool)
    spectrum = scipy.fft.rfft2(to_cells(whole), (PADDED, PADDED))
    return correlate(spectrum, np.arange(len(shape_bank().kinds)))


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
    visible = uncovered_areas()[rows] if free.all() else correlate(spectra[1], rows)
    iou = area + visible  # in float64, in place: these are half a million numbers
    iou -= common
    np.divide(common, iou, out=iou)
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
    counter = OverlapCounter(region, free)
    generator = np.random.default_rng(0)
    starts = search_coarsely(region, free)
    kinds = np.array([kind for kind, _ in starts])
    centres = np.stack([centre for _, centre in starts])
    scores = counter.measure(kinds, centres[:, None])[:, 0]
    steps = FIRST_STEPS
    for _ in range(ROUNDS):
        if scores.max() >= sufficient:
            break
        moves = generator.standard_normal((len(kinds), TRIALS // len(kinds), 5)) * steps
        candidates = (centres[:, None] + moves).clip(LOWEST, HIGHEST).astype(np.float32)
        overlaps = counter.measure(kinds, candidates)
        best = overlaps.argmax(1)[:, None]
        highest = np.take_along_axis(overlaps, best, 1)[:, 0]
        better = highest > scores
        moved = np.take_along_axis(candidates, best[..., None], 1)[:, 0]
        centres = np.where(better[:, None], moved, centres)
        scores = np.where(better, highest, scores)
        # The better half goes on, with more trials each.
        order = scores.argsort()[::-1][: max(2, (len(scores) + 1) // 2)]
        kinds, centres, scores = kinds[order], centres[order], scores[order]
        steps = steps * SHRINK
    winner = int(scores.argmax())
    parameters = tuple(centres[winner].tolist())
    return ShapeFit(int(kinds[winner]), parameters, float(scores[winner]))


class OverlapCounter:
    """Intersections over union of candidates with a region, both masks (FIT_SIDE, FIT_SIDE), in which only pixels that are `free`
    count."""

    def __init__(self, region: Mask, free: Mask) -> None:
        self.masks = np.stack([region, free & ~region])
        self.area = int(region.sum())

    def measure(self, kinds: NDArray[np.int64], candidates: Floats) -> NDArray[np.float64]:
        """Of n candidates of each of m kinds (m,), parameters (m, n, 5), (m, n)."""
        overlaps = np.empty(candidates.shape[:2])
        for kind in np.unique(kinds):
            rows = kinds == kind
            common, outside = self._count(int(kind), candidates[rows].reshape(-1, 5))
            overlaps[rows] = (common / (self.area + outside)).reshape(overlaps[rows].shape)
        return overlaps

    def _count(self, kind: int, candidates: Floats) -> NDArray[np.intp]:
        """The pixels of the region, and the others, inside each candidate (n, 5), (2, n)."""
        reach = candidates[:, 0] * REACH_OF_KIND[kind] + SLACK
        rows, columns = (self._bound(candidates[:, i], reach) for i in (4, 3))
        inside = covers(kind, candidates, *map(to_middles, (columns, rows)))
        bits = np.packbits(inside.reshape(len(candidates), -1), axis=1)
        masks = np.packbits(self.masks[:, rows, columns].reshape(2, -1), axis=1)
        return np.bitwise_count(bits & masks[:, None]).sum(2, dtype=np.intp)

    def _bound(self, centres: Floats, reach: Floats) -> slice:
        """The pixels of an axis that any candidate with this centre (n,) can cover, up to this distance (n,)."""
        first = math.floor(float((centres - reach).min()))
        last = math.ceil(float((centres + reach).max()))
        return slice(max(first, 0), min(last + 1, FIT_SIDE))


def to_middles(pixels: slice) -> Floats:
    """The coordinates of the middles of pixels of an axis."""
    return np.arange(pixels.start, pixels.stop, dtype=np.float32)
