"""Regions of one colour."""

import numpy as np
import pytest

from codegrid.data.shapes import LEAST_LEVEL, draw_shapes
from codegrid.evaluation.regions import BACKGROUND, MAX_HOLE, close_holes, find_regions, has_drift
from tests.helpers.shapes import BLUE, GREEN, RED, YELLOW, bar, ellipse, paint


def test_each_shape_of_another_colour_is_a_region_of_its_own() -> None:
    red, blue = ellipse(20, 30, 14, 14), bar(24, 20, 52, 44)
    large, small = find_regions(paint((red, RED), (blue, BLUE)))
    assert np.mean(large.mask == blue) > 0.995
    assert np.mean(small.mask == (red & ~blue)) > 0.995
    assert large.colour != small.colour


def test_parts_of_one_colour_that_another_divides_have_the_same_number() -> None:
    image = paint((bar(6, 26, 58, 38), RED), (bar(26, 10, 38, 54), BLUE))
    colours = {region.colour for region in find_regions(image)}
    assert len(find_regions(image)) == 3
    assert len(colours) == 2


def test_holes_of_rotation_are_closed_and_large_ones_stay() -> None:
    ring = ellipse(32, 32, 22, 22) & ~ellipse(32, 32, 8, 8)
    pierced = ring.copy()
    pierced[1::3, 1::3] = False
    [region] = find_regions(paint((pierced, GREEN)))
    assert np.mean(region.mask == ring) > 0.97
    assert not region.mask[32, 32]


def test_a_hole_at_the_edge_of_the_image_is_none() -> None:
    mask = np.ones((64, 64), bool)
    mask[10, 10:13] = mask[20:22, :2] = mask[40:44, 40:44] = False
    closed = close_holes(mask)
    assert closed[10, 11]
    assert not closed[20, 0]
    assert not closed[42, 42]
    assert MAX_HOLE < 16


def test_a_blurred_border_belongs_to_the_regions_beside_it() -> None:
    image = paint((bar(8, 20, 30, 44), RED), (bar(31, 20, 56, 44), GREEN)).astype(np.float32)
    for column, share in ((29, 0.2), (30, 0.4), (31, 0.6), (32, 0.8)):
        mixed = (1 - share) * np.array(RED) + share * np.array(GREEN)
        image[:, 20:45, column] = mixed[:, None]
    regions = find_regions(image.astype(np.uint8))
    assert [int(region.mask[32].sum()) for region in regions] == pytest.approx([26, 23], abs=1)


def test_specks_are_no_regions() -> None:
    image = np.zeros((3, 64, 64), np.uint8)
    image[:, 10:12, 10:12] = 255
    image[:, 40, 20:50] = 255  # a line of one pixel
    assert find_regions(image) == []


@pytest.mark.parametrize("level", [0, BACKGROUND - 1])
def test_what_is_too_dark_for_a_shape_is_background(level: int) -> None:
    assert find_regions(np.full((3, 64, 64), level, np.uint8)) == []


def test_no_shape_is_darker_than_the_least_level() -> None:
    images, _ = draw_shapes(4, "val", range(200))
    brightest = images.max(1)
    assert brightest[brightest > 0].min() >= LEAST_LEVEL


@pytest.mark.parametrize(("change", "expected"), [(12, 1), (60, 2)])
def test_colours_that_differ_little_are_one(change: int, expected: int) -> None:
    other = (YELLOW[0], YELLOW[1] - change, YELLOW[2])
    image = paint((bar(8, 8, 30, 50), YELLOW), (bar(31, 8, 54, 50), other))
    assert len(find_regions(image)) == expected


def test_noise_within_a_shape_divides_it_not() -> None:
    noise = np.random.default_rng(0).normal(0, 20, (3, 64, 64))
    image = paint((bar(10, 10, 50, 50), BLUE))
    noisy = np.where(image.any(0), image + noise, 0).clip(0, 255).astype(np.uint8)
    [region] = find_regions(noisy)
    assert np.mean(region.mask == bar(10, 10, 50, 50)) > 0.99


def test_a_colour_that_changes_gradually_drifts_and_a_blurred_border_does_not() -> None:
    steep, share = np.clip((np.arange(64) - 29) / 5, 0, 1), np.linspace(0, 1, 64)
    for change, expected in ((share, True), (steep, False)):
        row = (1 - change) * np.array(RED)[:, None] + change * np.array(BLUE)[:, None]
        mask = bar(6, 16, 58, 48)
        image = np.where(mask, row[:, None], 0).astype(np.uint8)
        regions = find_regions(image)
        assert len(regions) > 1
        assert has_drift(image, regions) == expected
