"""The judge of images of shapes: which ones data=shapes could have painted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from codegrid.data.shapes import Shapes, draw_shapes
from codegrid.engine.errors import InputError
from codegrid.evaluation.scores import ScoreSheet
from codegrid.evaluation.validity import (
    DRIFT,
    EMPTY,
    NO_ORDER,
    NO_SHAPE,
    REASONS,
    TOO_MANY,
    ValidityJudge,
    Verdict,
    judge_image,
    judge_images,
    summarize_verdicts,
)
from codegrid.evaluation.validity_picture import draw_verdicts, save_verdicts
from tests.helpers.images import make_images
from tests.helpers.shapes import (
    BLUE,
    GREEN,
    PINK,
    RED,
    YELLOW,
    bar,
    ellipse,
    paint,
    polygon,
    star,
)
from tests.helpers.stage1 import Noise

Image = NDArray[np.uint8]
DISK = ellipse(32, 32, 20, 20)
JAGGED = polygon(
    (0, 0), (32, 0), (24, 12), (42, 22), (24, 32), (42, 42), (24, 52), (32, 63), (0, 63)
)
NOISE = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)


def drifting(image: Image) -> Image:
    """An image that changes from its left edge to its right one: red becomes blue."""
    share = np.linspace(0, 1, 64)
    return ((1 - share) * image + share * image[::-1]).astype(np.uint8)


def test_images_of_the_data_are_valid() -> None:
    images, _ = draw_shapes(0, "val", range(12))
    assert all(verdict.valid for verdict in judge_images(images))


@pytest.mark.slow
def test_over_95_percent_of_many_images_of_the_data_are_valid_and_no_other_number_of_shapes() -> (
    None
):
    images, labels = draw_shapes(1, "val", range(150))
    verdicts = judge_images(images)
    assert np.mean([verdict.valid for verdict in verdicts]) > 0.95
    valid = [
        (len(v.shapes), label + 1) for v, label in zip(verdicts, labels, strict=True) if v.valid
    ]
    # Fewer where shapes are covered or too close in colour; a shape in parts may count more than once.
    assert np.mean([judged <= painted for judged, painted in valid]) > 0.98


@pytest.mark.parametrize("size", [128, 192])
def test_larger_images_of_the_data_are_valid_too(size: int) -> None:
    images, _ = draw_shapes(0, "val", range(8), size)
    assert all(verdict.valid for verdict in judge_images(images))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (paint(), EMPTY),
        (paint((bar(10, 10, 11, 11), RED)), EMPTY),
        (drifting(paint((DISK, RED))), DRIFT),
        (NOISE, DRIFT),
        (paint((DISK & ~ellipse(32, 32, 11, 11), GREEN)), NO_SHAPE),  # a ring
        (paint((bar(8, 26, 56, 38) | bar(26, 8, 38, 56), GREEN)), NO_SHAPE),  # a cross
        (paint((bar(14, 10, 24, 54) | bar(14, 42, 52, 54), GREEN)), NO_SHAPE),
        (paint((DISK & ~ellipse(42, 32, 18, 18), GREEN)), NO_SHAPE),  # a crescent
        (paint((ellipse(20, 24, 14, 8) | ellipse(40, 36, 10, 16), YELLOW)), NO_SHAPE),  # ragged
        (paint((ellipse(32, 32, 26, 6), YELLOW)), NO_SHAPE),  # thinner than any oval
        (paint((ellipse(32, 32, 4, 4), YELLOW)), NO_SHAPE),  # smaller than any disk
        (np.full((3, 64, 64), 200, np.uint8), NO_SHAPE),  # larger than any shape
        (paint((DISK & JAGGED, RED), (DISK & ~JAGGED, BLUE)), NO_ORDER),  # of two colours
        (
            paint(*((ellipse(12 + 20 * (i % 3), 16 + 26 * (i // 3), 8.5, 8.5), c)
                    for i, c in enumerate([RED, GREEN, BLUE, YELLOW, PINK, RED]))),
            TOO_MANY,
        ),
    ],
    ids=["black", "speck", "drift", "noise", "ring", "cross", "angle", "crescent", "ragged", "thin", "tiny", "full", "jagged",
         "six"],
)  # fmt: skip
def test_an_image_that_could_not_be_painted_is_invalid_for_this_reason(
    image: Image, reason: str
) -> None:
    assert judge_image(image).reason == reason


def test_one_bad_region_among_good_ones_makes_an_image_invalid() -> None:
    good = paint((ellipse(14, 14, 10, 10), RED), (star(46, 16, 14), BLUE))
    verdict = judge_image(good)
    assert verdict.valid
    assert {fit.name for _, fit in verdict.shapes} == {"disk", "star"}
    cross = bar(10, 44, 50, 50) | bar(27, 34, 33, 60)
    worse = good | paint((cross, GREEN))
    verdict = judge_image(worse)
    assert verdict.reason == NO_SHAPE
    assert len(verdict.shapes) == 2
    [(mask, fit)] = verdict.misfits
    assert np.mean(mask == cross) > 0.98
    assert fit.iou < 0.85


@pytest.mark.parametrize("reverse", [False, True])
def test_shapes_may_cover_each_other_in_any_order_of_painting(reverse: bool) -> None:
    layers = [
        (ellipse(26, 30, 18, 18), RED),
        (star(36, 34, 20), GREEN),
        (bar(34, 10, 58, 30), BLUE),
    ]
    verdict = judge_image(paint(*layers[:: -1 if reverse else 1]))
    assert verdict.valid
    assert len(verdict.shapes) == 3


def test_a_shape_is_judged_by_what_nearer_ones_leave_of_it() -> None:
    """Half a star is none, unless something may cover the other half."""
    half = star(30, 32, 24) & ~bar(32, 0, 63, 63)
    assert judge_image(paint((half, RED))).reason == NO_SHAPE
    assert judge_image(paint((star(30, 32, 24), RED), (bar(32, 8, 60, 56), BLUE))).valid


def test_a_shape_that_another_divides_is_one() -> None:
    verdict = judge_image(paint((bar(6, 22, 58, 42), RED), (bar(23, 6, 41, 58), BLUE)))
    assert verdict.valid
    assert [fit.name for _, fit in verdict.shapes] == ["rectangle", "rectangle"]
    assert verdict.shapes[1][0].sum() < 52 * 21  # the nearest comes first


def test_a_higher_overlap_is_stricter() -> None:
    rounded = bar(14, 20, 50, 44) & ellipse(32, 32, 21, 17)
    assert judge_image(paint((rounded, RED)), 0.8).valid
    assert not judge_image(paint((rounded, RED)), 0.98).valid


def test_verdicts_are_counted_by_reason() -> None:
    verdicts = [Verdict(), Verdict(EMPTY), Verdict(NO_SHAPE), Verdict(NO_SHAPE)]
    by_reason = {EMPTY: 1, DRIFT: 0, NO_SHAPE: 2, NO_ORDER: 0, TOO_MANY: 0}
    expected = {"n": 4, "valid": 0.25, "empty": 0.25, "by_reason": by_reason}
    assert summarize_verdicts(verdicts) == expected
    assert tuple(by_reason) == REASONS


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((1, 64, 64), "images of 1 channel have"),
        ((5, 64, 64), "images of 5 channels have"),
        ((3, 64, 128), "64x128 pixels are no"),
        ((3, 48, 48), "48x48 pixels are no multiple of 64x64"),
    ],
)
def test_images_that_cannot_be_judged_are_refused(shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        judge_images(np.zeros((2, *shape), np.uint8))


def judge_some(data: Any, limit: int, *batches: Image) -> tuple[ValidityJudge, ScoreSheet]:
    sheet = ScoreSheet({})
    judge = ValidityJudge(data, limit)
    for batch in batches:
        judge.add(torch.from_numpy(batch))
    judge.add_scores(sheet, {"valid": "valid_samples", "empty": "empty_samples"})
    return judge, sheet


def judge_batches(data: Any, limit: int, *batches: Image) -> ScoreSheet:
    return judge_some(data, limit, *batches)[1]


def test_the_scores_are_those_of_the_first_images(tmp_path: Path) -> None:
    data = make_images(Shapes, cache_dir=str(tmp_path))
    disk, nothing = paint((DISK, RED))[None], paint()[None]
    sheet = judge_batches(data, 3, nothing, np.concatenate([disk, disk]), nothing)
    assert sheet.values == {"valid_samples": 0.66667, "empty_samples": 0.33333}
    assert sheet.provenance["valid_samples"]["n"] == 3


def test_scores_are_absent_where_nothing_is_judged(tmp_path: Path) -> None:
    small = make_images(Shapes, image_size=32, cache_dir=str(tmp_path))
    sheet = judge_batches(small, 8, np.zeros((1, 3, 32, 32), np.uint8))
    assert sheet.values == {"valid_samples": None, "empty_samples": None}
    assert "32x32 pixels are no multiple of 64x64" in sheet.absent["valid_samples"]
    data = make_images(Shapes, cache_dir=str(tmp_path))
    assert judge_batches(data, 0).absent["empty_samples"] == "left out with validity=0"


def test_other_data_than_shapes_have_no_such_scores() -> None:
    sheet = judge_batches(Noise(64, cache="ram"), 8, np.zeros((1, 3, 64, 64), np.uint8))
    assert not sheet.values


def test_a_picture_has_white_outlines_of_what_fits_and_red_ones_of_what_does_not() -> None:
    images = np.stack(
        [paint((DISK, BLUE)), paint((DISK & ~ellipse(32, 32, 11, 11), BLUE)), paint()]
    )
    picture = draw_verdicts(images, judge_images(images), columns=2)
    height, width = 64 * 3 + 26, 64 * 3
    assert picture.shape == (3, 2 * height + 4, 2 * width + 4)
    left, right = picture[:, : 64 * 3, :width], picture[:, : 64 * 3, width + 4 :]
    white, red = (
        [bool((side == torch.tensor(colour)[:, None, None]).all(0).any()) for side in (left, right)]
        for colour in ((255, 255, 255), (255, 60, 60))
    )
    assert white == [True, False]
    assert red == [False, True]


def test_shapes_of_16_bits_are_judged_as_those_of_8(tmp_path: Path) -> None:
    deep = make_images(Shapes, cache_dir=str(tmp_path), depth=16)
    images = np.stack([paint((DISK, RED)), paint(), NOISE])
    sheets = []
    for data, pixels in ((deep, images.astype(np.int32) * 257), (None, images)):
        judge, sheet = judge_some(data or make_images(Shapes, cache_dir=str(tmp_path)), 3, pixels)
        assert np.array_equal(judge.images, images)
        sheets.append(sheet.values)
    assert sheets[0] == sheets[1] == {"valid_samples": 0.33333, "empty_samples": 0.33333}


def test_the_pictures_of_an_evaluation_show_the_verdicts_if_there_are_any(tmp_path: Path) -> None:
    data = make_images(Shapes, cache_dir=str(tmp_path))
    judge, _ = judge_some(data, 2, paint((DISK, RED))[None], paint()[None])
    assert save_verdicts(judge, tmp_path) == [tmp_path / "validity.png"]
    assert (tmp_path / "validity.png").is_file()
    judge, _ = judge_some(data, 0, paint()[None])
    assert save_verdicts(judge, tmp_path) == []
