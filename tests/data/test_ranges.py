"""The values that become the lowest and the highest pixel."""

import pytest

from codegrid.data.ranges import (
    AUTO,
    FULL_16_BITS,
    PERCENTILES,
    Range,
    check_value_range,
    choose_range,
)
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


@pytest.mark.parametrize(
    "value",
    [
        4095,
        "wide",
        [1],
        [5, 5],
        [9, 1],
        [0, "x"],
        [True, 3],
        [0, float("inf")],
        [[0, 1], [2, 2]],
        [],
        [[]],
    ],
)
def test_a_range_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(
        InputError, match=r"^data\.range=.* as \[0,4095\], or such a pair for each channel$"
    ):
        check_value_range(value)  # type: ignore[arg-type]


def test_whole_numbers_stay_whole_in_a_config() -> None:
    assert repr(check_value_range([0.0, 4095.0])) == "((0, 4095),)"


def test_an_open_range_is_that_of_all_values() -> None:
    assert check_value_range(None) == check_value_range("auto") == AUTO
    assert check_value_range("percentiles") == PERCENTILES


def test_a_range_for_each_channel_is_one_for_each_that_there_is() -> None:
    pairs = [[0, 255], [-1, 1], [0, 4095]]
    assert check_value_range(pairs, 3) == ((0, 255), (-1, 1), (0, 4095))
    assert check_value_range([[0, 255]], 3) == ((0, 255),)
    with pytest.raises(
        InputError, match=r"^data\.range has 3 pairs for data\.channels=5; give one"
    ):
        check_value_range(pairs, 5)
