"""How values become pixels, and pixels values."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.images import to_float, to_uint8
from codegrid.data.pixels import (
    PixelRules,
    check_depth,
    check_number_type,
    check_show,
    read_settings,
)
from codegrid.data.ranges import (
    FULL_16_BITS,
    format_ranges,
    to_range_setting,
)
from codegrid.data.scaling import are_short
from codegrid.data.store import fingerprint
from codegrid.engine.errors import InputError


def test_values_of_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(PixelRules(FULL_16_BITS).scale(values), values >> 8)


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14])
def test_values_of_fewer_bits_keep_their_upper_eight_too(bits: int) -> None:
    values = np.arange(2**bits, dtype=np.uint16)
    assert np.array_equal(PixelRules((0, 2**bits - 1)).scale(values), values >> (bits - 8))


def test_few_levels_are_spread_from_black_to_white() -> None:
    assert PixelRules((0, 3)).scale(np.arange(4, dtype=np.uint16)).tolist() == [0, 85, 170, 255]


def test_negative_values_are_darker_than_zero() -> None:
    scaled = PixelRules((-1024, 1023)).scale(np.array([-1024, -1, 0, 1023], np.int32))
    assert scaled.tolist() == [0, 127, 128, 255]


def test_values_that_are_no_numbers_are_black_and_do_not_count() -> None:
    values = np.array([np.nan, np.inf, -3.4e38, 0.5, 1.0], np.float32)
    rules = PixelRules((0, 1))
    assert rules.scale(values).tolist() == [0, 0, 0, 128, 255]
    assert not rules.beyond


def test_values_beyond_the_range_are_cut_off_and_noted() -> None:
    rules = PixelRules((0, 1023))
    assert rules.scale(np.array([-5, 2000], np.int32)).tolist() == [0, 255]
    assert rules.beyond == [((-5, 2000),)]
    assert rules.widen() == ((-8, 2047),)
    assert rules.report_beyond() == (-5, 2000)


def test_rules_of_no_dataset_note_nothing() -> None:
    rules = PixelRules()
    rules.scale(np.array([2000], np.uint16))
    assert not rules.beyond


def test_caches_of_version_0_1_stay_valid_where_its_rules_are_chosen() -> None:
    assert PixelRules().key() == PixelRules(FULL_16_BITS).key() == {}
    assert PixelRules((0, 4095)).key() != PixelRules((0, 1023)).key() != {}
    assert PixelRules(FULL_16_BITS, "ignore").key() != {}


@pytest.mark.parametrize("depth", [12, "16", True, 0])
def test_a_depth_that_is_none_is_refused(depth: Any) -> None:
    with pytest.raises(InputError, match=rf"^data\.depth={depth} must be 8 or 16 bits, or null"):
        check_depth(depth)


@pytest.mark.parametrize("show", [[], [1, 2], [0], [6], [3, 2, 6], "red", [True]])
def test_channels_that_pictures_can_not_show_are_refused(show: Any) -> None:
    with pytest.raises(
        InputError, match=r"must be one or three of the channels 1 to 5, as \[3,2,1\]$"
    ):
        check_show(show, 5)


def test_a_type_that_values_can_not_have_is_refused() -> None:
    assert check_number_type("int16") == "int16"
    with pytest.raises(InputError, match=r"^data\.number_type=int64 must be one of uint8, int8, "):
        check_number_type("int64")


def images_of(pixels: NDArray[Any]) -> Tensor:
    """Pixels as a model gets them and a perfect decoder returns them."""
    return to_float(
        torch.from_numpy(pixels.astype(np.int32 if pixels.dtype == np.uint16 else np.uint8))
    )


SIGNED = (-(2**15), 2**15 - 1)


@pytest.mark.parametrize(
    ("kind", "limits", "depth"),
    [
        ("uint16", FULL_16_BITS, 16),
        ("uint16", (0, 4095), 16),
        ("int16", SIGNED, 16),
        ("int32", (-1024, 3071), 16),
        ("uint32", (0, 2**20 - 1), 16),
        ("uint16", FULL_16_BITS, 8),
        ("uint16", (0, 4095), 8),
        ("int16", (-1024, 1023), 8),
        ("uint16", (0, 3), 8),
        ("uint16", (100, 300), 8),
    ],
)
def test_whole_numbers_come_back_within_half_a_step(
    kind: str, limits: tuple[int, int], depth: int
) -> None:
    low, high = limits
    values = np.unique(np.linspace(low, high, 70_000).astype(kind)).reshape(1, 1, 1, -1)
    rules = PixelRules(limits, depth=depth, number_type=kind)
    pixels = rules.scale(values)
    back = rules.to_units(images_of(pixels))
    assert (pixels.dtype, back.dtype) == (rules.dtype, kind)
    step = max(1, (high - low + 1) / 2**depth)
    assert np.abs(back.astype(np.int64) - values.astype(np.int64)).max() <= step / 2
    assert (pixels.min(), pixels.max()) == (0, rules.top)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("limits", [(-1, 1), (0, 2**-8), (-37.5, 1e6)])
def test_real_numbers_come_back_within_half_a_step(limits: tuple[float, float], depth: int) -> None:
    values = np.random.default_rng(0).uniform(*limits, (2, 3, 8, 8)).astype(np.float32)
    rules = PixelRules(limits, depth=depth, number_type="float32")
    back = rules.to_units(images_of(rules.scale(values)))
    assert back.dtype == np.float32
    span = limits[1] - limits[0]
    assert np.abs(back - values).max() <= (0.5 + 1e-3) * span / rules.top


def test_pixels_of_sixteen_bits_are_the_nearest_of_their_range() -> None:
    values = np.array([-5, 0, 1, 2, 4094, 4095, 9999], np.int32)
    expected = [0, 0, 16, 32, 65_519, 65_535, 65_535]
    assert PixelRules((0, 4095), depth=16).scale(values).tolist() == expected


def test_sixteen_bits_of_the_full_range_stay_as_they_are() -> None:
    values = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(PixelRules(FULL_16_BITS, depth=16).scale(values), values)
    assert np.array_equal(PixelRules(depth=16).scale(values), values)


def test_each_channel_has_its_range() -> None:
    rules = PixelRules(((0, 255), (-1024, 1023), (0, 4095)), depth=16, number_type="int16")
    values = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.int16)
    pixels = rules.scale(values)
    alone = [
        PixelRules(pair, depth=16).scale(values[..., i]) for i, pair in enumerate(rules.ranges)
    ]
    assert np.array_equal(pixels, np.stack(alone, -1))
    back = rules.to_units(images_of(pixels.transpose(2, 0, 1)[None]))
    assert np.array_equal(back[0].transpose(1, 2, 0), values)


def test_a_channel_beyond_its_own_range_is_noted() -> None:
    rules = PixelRules(((0, 10), (0, 1000)))
    rules.scale(np.array([[[5, 700]]], np.uint16))
    assert not rules.beyond
    rules.scale(np.array([[[700, 5]]], np.uint16))
    assert rules.beyond == [((700, 700), (5, 5))]
    assert rules.report_beyond() == (700, 700)
    assert rules.widen() == ((0, 1023), (0, 1023))


def test_ranges_for_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 channels, where data\.range has 2 pairs"):
        PixelRules(((0, 1), (0, 1))).scale(np.zeros((2, 2, 4), np.uint16))


@pytest.mark.parametrize("kind", ["int16", "float32"])
def test_what_a_file_marks_as_missing_is_the_lowest_pixel_and_does_not_count(kind: str) -> None:
    rules = PixelRules((-100, 1000), depth=16)
    scaled = rules.scale(np.array([-9999, -100, 1000, 450], kind), -9999)
    assert scaled.tolist() == [0, 0, 65_535, 32_768]
    assert not rules.beyond


def test_pixels_of_eight_bits_become_those_of_sixteen() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    rules = PixelRules(depth=16)
    deep = rules.deepen(pixels)
    assert deep.dtype == np.uint16
    assert np.array_equal(deep >> 8, pixels)
    assert deep[-1] == 65_535
    assert rules.deepen(deep) is deep
    assert PixelRules().deepen(pixels) is pixels
    # A model sees the same.
    assert (images_of(deep) - images_of(pixels)).abs().max() < 1e-6


def test_eight_bits_are_their_own_units() -> None:
    x = torch.rand(2, 3, 4, 4) * 2.2 - 1.1
    for rules in (PixelRules(), PixelRules((0, 4095), number_type="uint8")):
        assert rules.ranges == ((0, 255),)
        assert rules.is_whole
        assert np.array_equal(rules.to_units(x), to_uint8(x).numpy())
    deep = PixelRules(depth=16, number_type="uint8").to_units(x)
    assert deep.dtype == np.uint8
    assert np.array_equal(deep, to_uint8(x).numpy())


def test_a_type_that_is_not_recorded_is_none_of_whole_numbers() -> None:
    rules = PixelRules((0, 4095))
    assert rules.ranges == ((0, 4095),)
    assert not rules.is_whole
    assert rules.to_units(torch.tensor([[[[-1.0, 0, 1]]]])).tolist() == [[[[0, 2047.5, 4095]]]]


def test_units_are_cut_off_at_the_range_and_at_their_type() -> None:
    x = torch.tensor([[[[-3.0, 3.0]]]])
    assert PixelRules((10, 20), depth=16, number_type="int16").to_units(x).tolist() == [
        [[[10, 20]]]
    ]
    wide = PixelRules((-10, 70_000), depth=16, number_type="uint16").to_units(x)
    assert wide.tolist() == [[[[0, 65_535]]]]


def test_pixels_have_the_type_of_batches() -> None:
    x = torch.tensor([-2.0, -1, 0, 1, 2])
    assert PixelRules().to_pixels(x).tolist() == [0, 0, 128, 255, 255]
    deep = PixelRules(depth=16).to_pixels(x)
    assert (deep.dtype, deep.tolist()) == (torch.int32, [0, 0, 32_768, 65_535, 65_535])


@pytest.mark.parametrize(
    ("channels", "show", "expected"),
    [
        (1, None, [1]),
        (2, None, [1]),
        (3, None, [1, 2, 3]),
        (5, None, [1, 2, 3]),
        (5, (4, 3, 2), [4, 3, 2]),
        (2, (2,), [2]),
        (3, (3, 2, 1), [3, 2, 1]),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
def test_pictures_show_the_chosen_channels(
    channels: int, show: tuple[int, ...] | None, expected: list[int], depth: int
) -> None:
    x = torch.rand(2, channels, 4, 6) * 2 - 1
    picture = PixelRules((0, 4095), depth=depth, show=show).to_picture(x)
    assert torch.equal(picture, to_uint8(x[:, [number - 1 for number in expected]]))


def test_caches_of_other_depths_and_ranges_are_others() -> None:
    rules = [
        PixelRules(),
        PixelRules(depth=16),
        PixelRules((0, 4095)),
        PixelRules((0, 4095), depth=16),
    ]
    rules += [PixelRules(((0, 4095), (0, 1)), depth=16), PixelRules(((0, 1), (0, 4095)), depth=16)]
    assert len({fingerprint(each.key()) for each in rules}) == len(rules)
    # Neither what pictures show nor the type of what is decoded changes a pixel.
    assert PixelRules(show=(1,), number_type="uint16").key() == {}


def test_settings_of_earlier_runs_mean_eight_bits() -> None:
    assert read_settings({}) == PixelRules()
    assert read_settings({"range": [0, 4095], "alpha": "ignore"}) == PixelRules((0, 4095), "ignore")


def test_recorded_settings_are_read_back() -> None:
    rules = PixelRules(((0, 1), (-2, 2)), "white", False, 16, (2,), "float32")
    recorded = {"range": [[0, 1], [-2, 2]], "alpha": "white", "depth": 16, "show": [2]}
    assert read_settings({**recorded, "number_type": "float32", "channels": 2}) == rules
    assert to_range_setting(rules.ranges) == recorded["range"]
    assert format_ranges(rules.ranges) == "0 to 1, -2 to 2"


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    "ranges",
    [
        ((0, 4095),),
        ((0, 255),),
        ((0.5, 32_767.5),),
        ((-1000, 1000),),
        ((0, 4095), (100, 200), (-5, 32_000), (0, 1), (0, 32_767)),
    ],
)
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_quick_scaling_of_short_numbers_equals_slow_scaling_to_a_hundredth_of_a_step(
    kind: Any, ranges: Any, planar: bool
) -> None:
    random = np.random.default_rng(0)
    for spread in (300, 5000, 65_536):
        values = (random.integers(0, spread, (40, 30, 5)) - spread // 4).astype(kind)
        if planar:
            values = np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0)
        rules = PixelRules(ranges if len(ranges) > 1 else ranges[0], depth=16)
        assert are_short(values, ranges)
        pixels = rules.scale(values)
        low, high = np.array(ranges, np.float64).T
        exact = ((values - low) * (65_535 / (high - low))).clip(0, 65_535)
        assert np.abs(pixels - exact).max() <= 0.51
        slow = PixelRules(rules.value_range, depth=16)
        wide = values.astype(np.int32)  # which is not scaled quickly
        assert not are_short(wide, ranges)
        assert np.abs(slow.scale(wide).astype(int) - pixels).max() <= 1
        assert slow.beyond == rules.beyond


def test_whole_numbers_that_were_scaled_quickly_come_back() -> None:
    for span in (1, 2, 100, 4095, 32_767):
        rules = PixelRules((0, span), depth=16, number_type="uint16")
        values = np.arange(span + 1, dtype=np.uint16)[None, :, None]
        assert are_short(values, rules.scaled_ranges)
        pixels = rules.scale(values)[..., 0]
        x = to_float(torch.from_numpy(pixels.astype(np.int32)))[None, None]
        assert np.array_equal(rules.to_units(x)[0, 0], values[..., 0])
