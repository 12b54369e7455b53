"""data.range: the values that become the lowest and the highest pixel, for all channels or for each."""

import math
from collections.abc import Sequence
from typing import Any

from codegrid.engine.errors import InputError

FULL_8_BITS = (0, 2**8 - 1)
FULL_16_BITS = (0, 2**16 - 1)
AUTO, PERCENTILES = "auto", "percentiles"

Range = tuple[float, float]
Ranges = tuple[Range, ...]
RangeSetting = str | Sequence[float] | Sequence[Sequence[float]] | None


def as_ranges(value_range: Range | Ranges) -> Ranges:
    """A range for all channels, or one for each, as ranges."""
    first = value_range[0]
    return value_range if isinstance(first, tuple) else (value_range,)  # type: ignore[return-value]


def to_range_setting(ranges: Ranges) -> list[Any]:
    """data.range for these ranges: [low, high], or a list of such pairs where channels differ."""
    pairs = [list(pair) for pair in ranges]
    return pairs[0] if len(pairs) == 1 else pairs


def write_ranges(ranges: Ranges) -> str:
    """Ranges as a command has them: [0,4095]."""
    return str(to_range_setting(ranges)).replace(" ", "")


def format_ranges(ranges: Ranges) -> str:
    """Ranges in a sentence: 0 to 4,095, and where channels differ those of the first four."""
    texts = [f"{low:,.6g} to {high:,.6g}" for low, high in ranges[:4]]
    return ", ".join(texts) + (f" and {len(ranges) - 4} more" if len(ranges) > 4 else "")


def check_value_range(setting: RangeSetting, channels: int | None = None) -> Ranges | str:
    """data.range as ranges, one for all channels or one for each of `channels`; or AUTO, also for null, or PERCENTILES.

    Raises InputError for anything else.
    """
    if setting is None or (isinstance(setting, str) and setting in (AUTO, PERCENTILES)):
        return setting or AUTO
    items = [setting] if isinstance(setting, int | float | str) else list(setting)
    pairs = items if all(isinstance(item, Sequence) for item in items) else [items]
    ranges = tuple(pair for item in pairs if (pair := _read_pair(item)))
    if not pairs or len(ranges) < len(pairs):
        shown = items[0] if len(items) == 1 and not isinstance(items[0], Sequence) else setting
        raise InputError(
            f"data.range={shown} must be auto, percentiles, the values that become the lowest and the highest pixel, "
            "as [0,4095], or such a pair for each channel"
        )
    if channels is not None and len(ranges) not in (1, channels):
        raise InputError(
            f"data.range has {len(ranges)} pairs for data.channels={channels}; give one pair for all, or one for each"
        )
    return ranges


def _read_pair(item: Any) -> Range | None:
    """Two rising numbers as a range; None for anything else."""
    if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
        return None
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in item):
        return None
    low, high = item
    if not -math.inf < low < high < math.inf:
        return None
    return to_plain_number(low), to_plain_number(high)


def choose_range(lowest: float, highest: float) -> Range:
    """Black and white for values from `lowest` to `highest`.

    White is the smallest 2^b - 1 that holds the highest value, or 2^-b if that is below 1: 4095 for 12-bit values in 16-bit
    files. Black is 0, or, if there are negative values, the smallest -2^b that holds the lowest. So the brightest pixel is
    always in the upper half, and a few brighter images do not change the scale.
    """
    black = 0.0 if lowest >= 0 else -(2.0 ** math.ceil(math.log2(-lowest)))
    if highest <= 0:
        white = 0.0 if black else 1.0
    elif highest <= 1:
        white = 2.0 ** math.ceil(math.log2(highest))
    else:
        white = float(2 ** math.ceil(highest).bit_length() - 1)
    return to_plain_number(black), to_plain_number(white)


def choose_common_range(extremes: Sequence[Range]) -> Range:
    """Black and white for values of several images, given as the lowest and highest of each."""
    lows, highs = zip(*extremes, strict=True)
    return choose_range(min(lows), max(highs))


def to_plain_number(value: float) -> float:
    """A whole number as int, so that configs and messages show 4095 and not 4095.0."""
    return int(value) if float(value).is_integer() else float(value)


def find_outside(ranges: Ranges, extremes: Sequence[Range]) -> list[Range]:
    """Those of the lowest and highest values, for each range, of which one lies outside of it."""
    return [
        (lowest, highest)
        for (low, high), (lowest, highest) in zip(ranges, extremes, strict=True)
        if lowest < low or highest > high
    ]
