"""How values of more than 8 bits and fourth channels become plain colours, the same for all images of a dataset."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.images import to_uint8
from codegrid.engine.errors import InputError

FULL_16_BITS = (0, 2**16 - 1)
ALPHA_CHOICES = ("white", "ignore")
NO_DATA = 1e30  # floating-point files mark pixels without a value by numbers as large as this
MAX_NOTES = 1000  # images whose values lie outside the range: more are not counted

Range = tuple[float, float]


class ValuesBeyondRange(Exception):
    """An image has values outside the range that was chosen from a sample of the images."""


@dataclass
class PixelRules:
    """What an image that isn't plain 8-bit colour is turned into.

    value_range    the values that become black and white in images of more than 8 bits a channel. None: not chosen; 16-bit
                   images then keep their upper 8 bits, and other values are unreadable
    alpha          "white": transparent pixels are blended with white; "ignore": the fourth channel, or the second of a grey
                   image, is left out
    is_open        the range may still be chosen or widened: values outside it are noted in `beyond`
    depth          bits of a channel of the pixels: 8 or 16
    show           the channels that pictures show, counted from 1: three of them or one; None: the first three, or the only one
    beyond         (lowest, highest) value of images that have values outside the range
    """

    value_range: Range | None = None
    alpha: str = "white"
    is_open: bool = False
    depth: int = 8
    show: tuple[int, ...] | None = None
    beyond: list[Range] = field(default_factory=list, compare=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the pixels, uint8 or uint16."""
        return np.dtype(f"uint{self.depth}")

    @property
    def reads_all_bits(self) -> bool:
        """Whether 16-bit colours need all their bits; without, their upper 8 bits are enough."""
        return self.is_open or self.value_range not in (None, FULL_16_BITS)

    def key(self) -> dict[str, Any]:
        """What a cache of pixels is known by; empty for the rules of version 0.1, whose caches stay valid."""
        if self.alpha == "white" and self.value_range in (None, FULL_16_BITS):
            return {}
        return {"value_range": list(self.value_range or FULL_16_BITS), "alpha": self.alpha}

    def scale(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Values of more than 8 bits, of any shape, as uint8: black is 0, white 255, and values beyond are cut off.

        Whole numbers keep their upper 8 bits, as 16-bit files always have here: white + 1 is divided into 256 equal parts.
        """
        lowest, highest = find_extremes(values)
        self._note(lowest, highest)
        black, white = self.value_range or FULL_16_BITS
        span = white - black
        if values.dtype.kind in "iu" and span >= 255 and float(span).is_integer():
            whole = values.astype(np.int64).clip(math.ceil(black), math.floor(white))
            return ((whole - int(black)) * 256 // (int(span) + 1)).astype(np.uint8)
        real = np.where(mask_numbers(values), values, black).astype(np.float64).clip(black, white)
        return np.rint((real - black) * (255 / span)).astype(np.uint8)

    def to_picture(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) about [-1, 1] -> uint8 (B, 3, H, W) of the shown channels, or (B, 1, H, W) if only one is."""
        channels = x.shape[1]
        shown = self.show or (range(1, 4) if channels > 2 else [1])
        return to_uint8(x[:, [number - 1 for number in shown]])

    def to_units(self, x: Tensor) -> NDArray[Any]:
        """Images (B, C, H, W) about [-1, 1] -> values in the data's own units, of the data's own type."""
        return to_uint8(x).cpu().numpy()

    def _note(self, lowest: float, highest: float) -> None:
        if self.value_range is None and not self.is_open:
            return
        black, white = self.value_range or (0, 0)
        if (lowest < black or highest > white) and len(self.beyond) < MAX_NOTES:
            self.beyond.append((lowest, highest))  # atomic, so threads need no lock

    def widen(self) -> Range:
        """The range that also holds the values noted in `beyond`."""
        lows, highs = zip(*self.beyond, *filter(None, [self.value_range]), strict=True)
        return choose_range(min(lows), max(highs))


def mask_numbers(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where values are numbers, neither NaN nor infinite nor a mark of missing data."""
    if values.dtype.kind != "f":
        return np.ones(values.shape, bool)
    return np.isfinite(values) & (np.abs(values) < NO_DATA)


def find_extremes(values: NDArray[Any]) -> Range:
    """The lowest and the highest value; NaN, infinities and marks of missing data don't count. (0, 0) without any other."""
    if values.dtype.kind == "f":
        values = values[mask_numbers(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


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


def to_plain_number(value: float) -> float:
    """A whole number as int, so that configs and messages show 4095 and not 4095.0."""
    return int(value) if float(value).is_integer() else float(value)


def check_value_range(value_range: Sequence[float] | None) -> Range | None:
    """data.value_range as a pair. Raises InputError unless it is null or two rising numbers."""
    if value_range is None:
        return None
    values = [value_range] if isinstance(value_range, int | float | str) else list(value_range)
    if (
        len(values) != 2
        or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values)
        or not -math.inf < values[0] < values[1] < math.inf
    ):
        shown = values if len(values) != 1 else values[0]
        raise InputError(
            f"data.value_range={shown} must be the values that become black and white, as [0,4095]"
        )
    return to_plain_number(values[0]), to_plain_number(values[1])
