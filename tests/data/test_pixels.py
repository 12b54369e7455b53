"""The range of values and the alpha of a dataset."""

import numpy as np
import pytest

from codegrid.data.pixels import FULL_16_BITS, PixelRules, Range, check_value_range, choose_range
from codegrid.engine.errors import InputError


@pytest.mark.parametrize(
    ("lowest", "highest", "chosen"),
    [
        (0, 4095, (0, 4095)),
        (0, 4096, (0, 8191)),
        (12, 1000, (0, 1023)),
        (0, 65_535, FULL_16_BITS),
        (0, 70_000, (0, 2**17 - 1)),
        (0, 3, (0, 3)),
        (0, 1, (0, 1)),
        (0.0, 0.8, (0, 1)),
        (0.0, 0.002, (0, 2**-8)),
        (0.0, 254.6, (0, 255)),
        (-1000, 2000, (-1024, 2047)),
        (-0.9, 0.9, (-1, 1)),
        (-80, -5, (-128, 0)),
        (0, 0, (0, 1)),
    ],
)
def test_the_range_is_the_smallest_number_of_bits_that_holds_all_values(
    lowest: float, highest: float, chosen: Range
) -> None:
    assert choose_range(lowest, highest) == chosen


@pytest.mark.parametrize("highest", [1e-30, 0.3, 1, 2, 3, 100, 4097, 1e9, 1e20])
def test_the_largest_value_is_in_the_upper_half_of_the_range(highest: float) -> None:
    black, white = choose_range(0, highest)
    assert black == 0
    assert white / 2 < highest + 1
    assert highest <= white


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
    assert rules.beyond == [(-5, 2000)]
    assert rules.widen() == (-8, 2047)


def test_rules_of_no_dataset_note_nothing() -> None:
    rules = PixelRules()
    rules.scale(np.array([2000], np.uint16))
    assert not rules.beyond


def test_caches_of_version_0_1_stay_valid_where_its_rules_are_chosen() -> None:
    assert PixelRules().key() == PixelRules(FULL_16_BITS).key() == {}
    assert PixelRules((0, 4095)).key() != PixelRules((0, 1023)).key() != {}
    assert PixelRules(FULL_16_BITS, "ignore").key() != {}


@pytest.mark.parametrize(
    "value", [4095, "wide", [1], [5, 5], [9, 1], [0, "x"], [True, 3], [0, float("inf")]]
)
def test_a_range_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"^data\.value_range=.* as \[0,4095\]$"):
        check_value_range(value)  # type: ignore[arg-type]


def test_whole_numbers_stay_whole_in_a_config() -> None:
    assert repr(check_value_range([0.0, 4095.0])) == "(0, 4095)"
    assert check_value_range(None) is None
