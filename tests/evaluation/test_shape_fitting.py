"""The search for the shape that overlaps most with a region."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.optimize import differential_evolution

from codegrid.data.shapes import CENTRES, MIN_ASPECT, RADIUS, SHAPES
from codegrid.evaluation import shape_fitting
from codegrid.evaluation.shape_fitting import (
    CELLS,
    CENTRE_CELLS,
    FIRST_STEPS,
    FIT_SIDE,
    HIGHEST,
    LOWEST,
    PADDED,
    REACH,
    ROUNDS,
    SHRINK,
    STAR,
    TRIALS,
    Mask,
    ShapeFit,
    correlate,
    covers,
    covers_star,
    fit_shape,
    measure_overlap,
    search_coarsely,
    shape_bank,
    to_cells,
    uncovered_areas,
)
from tests.helpers.shapes import bar, ellipse, polygon, star

EVERYWHERE = np.ones((FIT_SIDE, FIT_SIDE), bool)
KINDS = ("rectangle", "triangle", "disk", "oval", "star")
BLOB = ellipse(24, 26, 15, 10) | ellipse(36, 36, 12, 7, 1.1) | bar(30, 12, 34, 30)


def slow_corners(kind: str, radius: float, aspect: float) -> list[tuple[float, float]]:
    """The corners of a shape around (0, 0), of a round one many."""
    r, a = radius, aspect
    if kind == "rectangle":
        return [(-r, -r * a), (r, -r * a), (r, r * a), (-r, r * a)]
    if kind == "triangle":
        half = r * (0.6 + 0.4 * a)
        return [(0, -r), (half, r), (-half, r)]
    if kind == "star":
        lengths = [r if i % 2 == 0 else 0.45 * r for i in range(10)]
        turns = [i * np.pi / 5 for i in range(10)]
        return [(s * np.sin(t), s * np.cos(t)) for s, t in zip(lengths, turns, strict=True)]
    across = r * (0.5 + 0.5 * a) if kind == "disk" else r
    down = across if kind == "disk" else r * (0.3 + 0.4 * a)
    return [
        (across * np.cos(t), down * np.sin(t))
        for t in np.linspace(0, 2 * np.pi, 90, endpoint=False)
    ]


def slow_fit(region: Mask, free: Mask, sufficient: float) -> ShapeFit:
    """The same search, candidate by candidate over all pixels, and stars by their angles."""
    rows, columns = np.indices((FIT_SIDE, FIT_SIDE), np.float32)

    def overlap(kind: int, candidate: Any) -> float:
        radius, aspect, angle, left, top = candidate
        cos, sin = np.cos(angle), np.sin(angle)
        u = cos * columns + (sin * rows - (cos * left + sin * top))
        v = cos * rows - (sin * columns + (cos * top - sin * left))
        return measure_overlap(region, free, SHAPES[kind](u, v, radius, aspect))

    generator = np.random.default_rng(0)
    leaders = [(overlap(*start), *start) for start in search_coarsely(region, free)]
    steps = FIRST_STEPS
    for _ in range(ROUNDS):
        if max(score for score, *_ in leaders) >= sufficient:
            break
        moves = generator.standard_normal((len(leaders), TRIALS // len(leaders), 5)) * steps
        for i, (score, kind, centre) in enumerate(leaders):
            for move in moves[i]:
                candidate = (centre + move).clip(LOWEST, HIGHEST).astype(np.float32)
                if (trial := overlap(kind, candidate)) > score:
                    score = trial
                    leaders[i] = score, kind, candidate
        order = np.argsort([score for score, *_ in leaders])[::-1]
        leaders = [leaders[i] for i in order[: max(2, (len(leaders) + 1) // 2)]]
        steps = steps * SHRINK
    score, kind, candidate = max(leaders, key=lambda each: each[0])
    return ShapeFit(kind, tuple(map(float, candidate)), score)  # type: ignore[arg-type]


def slow_mask(
    kind: str, radius: float, aspect: float, angle: float, left: float, top: float
) -> Mask:
    """A shape by its corners, eight times as fine as pixels: those that it covers by half or more."""
    cos, sin = np.cos(angle), np.sin(angle)
    moved = [
        (left + cos * u - sin * v, top + sin * u + cos * v)
        for u, v in slow_corners(kind, radius, aspect)
    ]
    picture = Image.new("1", (8 * FIT_SIDE, 8 * FIT_SIDE))
    ImageDraw.Draw(picture).polygon([(8 * x + 3.5, 8 * y + 3.5) for x, y in moved], fill=1)
    covered: Mask = np.array(picture).reshape(FIT_SIDE, 8, FIT_SIDE, 8).mean((1, 3)) >= 0.5
    return covered


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_covers_the_pixels_within_its_corners(kind: str) -> None:
    parameters = (17.0, 0.8, 0.7, 30.3, 35.8)
    fast = ShapeFit(KINDS.index(kind), parameters, 1.0)
    assert fast.name == kind
    assert measure_overlap(slow_mask(kind, *parameters), EVERYWHERE, fast.mask()) > 0.96


def test_an_enlarged_shape_covers_the_same_share_of_its_image() -> None:
    fit = ShapeFit(4, (20.0, 1.0, 0.3, 30.0, 40.0), 1.0)
    cells = fit.mask(3).reshape(FIT_SIDE, 3, FIT_SIDE, 3).mean((1, 3))
    assert np.abs(cells - fit.mask()).mean() < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "parameters", [(14.0, 0.5, 2.0, 28.0, 33.0), (23.0, 0.9, 5.1, 52.0, 20.0)], ids=["small", "cut"]
)
def test_a_shape_is_fitted_to_itself(kind: str, parameters: tuple[Any, ...]) -> None:
    """The second one lies partly outside the image."""
    region = slow_mask(kind, *parameters)
    assert fit_shape(region, EVERYWHERE, 0.93).iou >= 0.93


@pytest.mark.parametrize(
    "region", [BLOB, star(30, 30, 16) | bar(36, 28, 60, 36)], ids=["blob", "key"]
)
def test_a_fit_is_as_good_as_that_of_a_slow_search(region: Mask) -> None:
    """Differential evolution over all parameters of each kind."""
    pixels = np.arange(FIT_SIDE, dtype=np.float32)
    place = (FIT_SIDE * CENTRES[0], FIT_SIDE * CENTRES[1])

    def loss_of(kind: int) -> Callable[[Any], Any]:
        def loss(candidates: Any) -> Any:  # (5, n)
            inside = covers(kind, candidates.T.astype(np.float32), pixels, pixels)
            return -(inside & region).sum((1, 2)) / (inside | region).sum((1, 2))

        return loss

    slow = max(
        -differential_evolution(
            loss_of(kind), [RADIUS, (MIN_ASPECT, 1), (0, 2 * np.pi), place, place],
            vectorized=True, updating="deferred", popsize=12, maxiter=25, rng=0, polish=False,
        ).fun
        for kind in range(len(SHAPES))
    )  # fmt: skip
    fast = fit_shape(region, EVERYWHERE, 1.0)
    assert fast.iou == pytest.approx(measure_overlap(region, EVERYWHERE, fast.mask()))
    assert fast.iou > slow - 0.015


def test_what_a_nearer_shape_covers_counts_neither_for_a_fit_nor_against_it() -> None:
    disk, cover = ellipse(30, 32, 20, 20), bar(30, 0, 63, 63)
    region = disk & ~cover
    assert fit_shape(region, ~cover, 0.95).iou >= 0.95
    assert measure_overlap(region, ~cover, disk) == 1
    assert measure_overlap(region, EVERYWHERE, disk) == pytest.approx(region.sum() / disk.sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_overlaps_no_less_if_more_is_covered(seed: int) -> None:
    generator = np.random.default_rng(seed)
    region, shape, free, cover = (
        ellipse(*generator.uniform(20, 44, 2), *generator.uniform(8, 20, 2)) for _ in range(4)
    )
    region &= ~cover
    before = measure_overlap(region, free | region, shape)
    assert measure_overlap(region, (free | region) & ~cover, shape) >= before


def test_fits_stay_in_the_ranges_of_the_data() -> None:
    small = fit_shape(ellipse(30, 30, 4, 4), EVERYWHERE, 1.0)
    large = fit_shape(EVERYWHERE, EVERYWHERE, 1.0)
    assert small.iou < 0.5
    assert large.iou < 0.85
    for fit in (small, large):
        radius, aspect, _, column, row = fit.parameters
        assert RADIUS[0] <= radius <= RADIUS[1]
        assert MIN_ASPECT - 1e-6 <= aspect <= 1
        assert FIT_SIDE * CENTRES[0] - 1e-4 <= min(column, row)
        assert max(column, row) <= FIT_SIDE * CENTRES[1] + 1e-4


def test_the_coarse_search_begins_near_the_place_of_a_triangle() -> None:
    region = polygon((12, 50), (44, 50), (28, 20))
    kind, (radius, _, _, column, row) = search_coarsely(region, EVERYWHERE)[0]
    assert KINDS[kind] == "triangle"
    assert (radius, column, row) == pytest.approx((15, 28, 35), abs=4)


def test_a_fit_is_the_same_each_time() -> None:
    assert fit_shape(BLOB, EVERYWHERE, 1.0) == fit_shape(BLOB, EVERYWHERE, 1.0)


COVER = bar(30, 0, 63, 63)
FITS = {
    "blob": (BLOB, EVERYWHERE),
    "covered blob": (BLOB & ~COVER, ~COVER),
    "star at the edge": (star(5, 30, 20), EVERYWHERE),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_that_of_a_search_over_all_pixels_to_the_bit(name: str) -> None:
    region, free = FITS[name]
    assert fit_shape(region, free, 1.0) == slow_fit(region, free, 1.0)


def test_a_fit_that_looked_too_near_its_centre_would_be_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = fit_shape(BLOB, EVERYWHERE, 1.0)
    monkeypatch.setattr(shape_fitting, "REACH_OF_KIND", np.full(len(SHAPES), 0.8))
    monkeypatch.setattr(shape_fitting, "SLACK", 0)
    assert fit_shape(BLOB, EVERYWHERE, 1.0) != right


def test_a_star_without_angles_is_a_star_by_its_angles_also_on_its_edge() -> None:
    generator = np.random.default_rng(0)
    radius, aspect = generator.uniform([[*RADIUS[:1]], [MIN_ASPECT]], [[RADIUS[1]], [1]], (2, 300))
    radius, aspect = (each[:, None, None].astype(np.float32) for each in (radius, aspect))
    # Points along the edge, from tip to notch to tip, and anywhere.
    share, corner = generator.uniform(0, 1, (300, 1, 40)), generator.integers(10, size=(300, 1, 40))
    ends = [np.where(i % 2, 0.45, 1.0) * radius for i in (corner, corner + 1)]
    turns = [i * np.pi / 5 for i in (corner, corner + 1)]
    edge = [
        sum(w * end * f(turn) for w, end, turn in zip((1 - share, share), ends, turns, strict=True))
        for f in (np.sin, np.cos)
    ]
    anywhere = generator.uniform(-40, 40, (2, 300, 1, 400))
    u, v = (
        np.concatenate(parts, 2).astype(np.float32) for parts in zip(edge, anywhere, strict=True)
    )
    expected = SHAPES[STAR](u, v, radius, aspect)
    assert np.array_equal(covers_star(u, v, radius, aspect), expected)
    assert 0.2 < expected[:, :, :40].mean() < 0.8  # rounding decides
    assert 0.02 < expected.mean() < 0.5


def test_cells_that_shapes_share_with_a_mask_are_counted_at_each_place() -> None:
    """Some shapes of the bank, more than are transformed together, and those of a mask of the whole image, which are cached."""
    rows = np.arange(0, len(shape_bank().kinds), 11)
    pixels = np.arange(2 * REACH, dtype=np.float32) - np.float32(REACH - 0.5)
    for mask in (BLOB, EVERYWHERE):
        cells = np.pad(to_cells(mask), REACH // 2)
        spectrum = np.fft.rfft2(to_cells(mask), (PADDED, PADDED)).astype(np.complex64)
        counted = correlate(spectrum, rows)
        for i, row in enumerate(rows):
            candidate = np.array([[*shape_bank().settings[row], 0, 0]], np.float32)
            shape = to_cells(covers(int(shape_bank().kinds[row]), candidate, pixels, pixels)[0])
            slow = [
                (cells[y : y + REACH, x : x + REACH] * shape).sum()
                for y in CENTRE_CELLS
                for x in CENTRE_CELLS
            ]
            np.testing.assert_allclose(counted[i], slow, atol=1e-3)
    np.testing.assert_allclose(uncovered_areas()[rows], counted, atol=1e-3)
    assert len(cells) == CELLS + REACH
