"""How values of any bits become pixels, the same for all images of a dataset, and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.images import to_depth, to_uint8
from codegrid.data.ranges import (
    FULL_8_BITS,
    FULL_16_BITS,
    Range,
    Ranges,
    as_ranges,
    check_value_range,
    choose_common_range,
    find_outside,
    to_range_setting,
)
from codegrid.data.scaling import (
    are_short,
    find_channel_extremes,
    find_extremes,
    find_numbers,
    scale_short,
)
from codegrid.data.shown import pick_shown
from codegrid.engine.errors import InputError

# The settings of a dataset that rules consist of.
RULE_SETTINGS = ("range", "alpha", "depth", "show", "number_type")
DEPTHS = (8, 16)
ALPHA_CHOICES = ("white", "ignore")
# Types that values can have in their own units; wider whole numbers are no pixels of a known format.
NUMBER_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32")
MAX_CHANNELS = 16
MAX_NOTES = 1000  # images whose values lie outside the range: more are not counted


class ValuesBeyondRange(Exception):
    """An image has values outside the range that was chosen from a sample of the images."""


@dataclass
class PixelRules:
    """What the values of images become as pixels, and what pixels are in the units of the data.

    value_range    (low, high), the values that become the lowest and the highest pixel in images of more than 8 bits a
                   channel; or a pair for each channel. None: not chosen; 16-bit images then keep their full range, and
                   other values are unreadable
    alpha          "white": transparent pixels are blended with white; "ignore": the fourth channel, or the second of a grey
                   image, is left out
    is_open        the range may still be chosen or widened: values outside it are noted in `beyond`
    depth          bits of a channel of the pixels: 8 or 16
    show           the channels that pictures show, counted from 1: three of them or one; None: the first three, or the first
                   of one or two
    number_type    the type that decoded values have in the data's own units, one of NUMBER_TYPES; None: not known, uint8
                   for the full range and float32 for others
    beyond         (lowest, highest) for each range, of images that have values outside
    """

    value_range: Range | Ranges | None = None
    alpha: str = "white"
    is_open: bool = False
    depth: int = 8
    show: tuple[int, ...] | None = None
    number_type: str | None = None
    beyond: list[Ranges] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if self.value_range and len(self.value_range) == 1:  # one range for all channels
            self.value_range = self.value_range[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the pixels, uint8 or uint16."""
        return np.dtype(f"uint{self.depth}")

    @property
    def top(self) -> int:
        """The highest pixel."""
        return 2**self.depth - 1

    @property
    def scaled_ranges(self) -> Ranges:
        """The ranges that values of more than 8 bits are scaled by: one for each channel, or one for all."""
        return as_ranges(self.value_range or FULL_16_BITS)

    @property
    def is_plain(self) -> bool:
        """Whether pixels are the values of the data, which have 8 bits."""
        if self.number_type is None:
            return self.depth == 8 and self.value_range in (None, FULL_16_BITS)
        return self.number_type == "uint8"

    @property
    def ranges(self) -> Ranges:
        """What the lowest and the highest pixel are in the units of the data: for each channel, or once for all."""
        return (FULL_8_BITS,) if self.is_plain else self.scaled_ranges

    @property
    def unit_type(self) -> np.dtype[Any]:
        """The type of values in the data's own units."""
        return np.dtype(self.number_type or ("uint8" if self.is_plain else "float32"))

    @property
    def is_whole(self) -> bool:
        """Whether the data's own values are whole numbers."""
        return self.unit_type.kind != "f"

    @property
    def reads_all_bits(self) -> bool:
        """Whether 16-bit colours need all their bits; without, their upper 8 bits are enough."""
        return self.is_open or self.depth > 8 or self.value_range not in (None, FULL_16_BITS)

    def key(self) -> dict[str, Any]:
        """What a cache of pixels is known by; empty for the rules of version 0.1, whose caches stay valid."""
        depth = {} if self.depth == 8 else {"depth": self.depth}
        if self.alpha == "white" and self.value_range in (None, FULL_16_BITS):
            return depth
        return {"value_range": to_range_setting(self.scaled_ranges), "alpha": self.alpha, **depth}

    def scale(self, values: NDArray[Any], missing: float | None = None) -> NDArray[Any]:
        """Values of more than 8 bits, of any shape, as pixels: low is 0, high is the highest, and values beyond are cut off.

        If each channel has a range of its own, the last axis is that of the channels. Values that are no numbers become 0, and
        so does `missing`, by which a file marks pixels without data.
        Pixels of 16 bits are the nearest ones. With 8 bits, whole numbers keep their upper 8 bits, as 16-bit files always
        have here: high - low + 1 values are divided into 256 equal parts.
        """
        ranges = self.scaled_ranges
        if missing is None and self.depth == 16 and are_short(values, ranges):
            if len(ranges) == 1:
                extents = [find_extremes(values)]
            else:
                extents = find_channel_extremes(values)
            self._note(extents)
            return scale_short(values, ranges, extents)
        if len(ranges) == 1:
            extremes, numbers = find_numbers(values, missing)
            if numbers is None or numbers.any():
                self._note([extremes])
            return self._scale_part(values, ranges[0], extremes, numbers)
        if values.ndim == 0 or values.shape[-1] != len(ranges):
            raise ValueError(
                f"{values.shape[-1] if values.ndim > 2 else 1} channels, where data.range has {len(ranges)} pairs"
            )
        parts = [values[..., channel] for channel in range(len(ranges))]
        limits, masks = zip(*(find_numbers(part, missing) for part in parts), strict=True)
        self._note(
            [
                each if mask is None or mask.any() else chosen  # without numbers none is outside
                for each, mask, chosen in zip(limits, masks, ranges, strict=True)
            ]
        )
        return np.stack([*map(self._scale_part, parts, ranges, limits, masks)], -1)

    def _scale_part(
        self,
        values: NDArray[Any],
        limits: Range,
        extremes: Range,
        numbers: NDArray[np.bool_] | None,
    ) -> NDArray[Any]:
        """Values of one range as pixels; `extremes` and `numbers` are of find_numbers."""
        low, high = limits
        span = high - low
        is_whole = values.dtype.kind in "iu"
        if numbers is not None:
            values = np.where(numbers, values.astype(np.int64) if is_whole else values, low)
        if self.depth == 8 and is_whole and span >= 255 and float(span).is_integer():
            whole = values.astype(np.int64).clip(math.ceil(low), math.floor(high))
            return ((whole - int(low)) * 256 // (int(span) + 1)).astype(np.uint8)
        if values.dtype == self.dtype and limits == (0, self.top):
            return values
        real = values.astype(np.float64)
        if extremes[0] < low or extremes[1] > high:
            real.clip(low, high, out=real)
        real -= low
        real *= self.top / span
        return np.rint(real, out=real).astype(self.dtype)

    def deepen(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Pixels of 8 bits as pixels of these rules: at 16 bits 255 becomes 65535. Pixels of 16 bits stay as they are."""
        if self.depth == 8 or pixels.dtype != np.uint8:
            return pixels
        return pixels.astype(np.uint16) * np.uint16(257)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Images of any shape about [-1, 1] -> pixels as batches have them, uint8 or, of 16 bits, int32."""
        return to_depth(x, self.depth)

    def to_picture(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) about [-1, 1] -> uint8 (B, 3, H, W) of the shown channels, or (B, 1, H, W) if only one is."""
        return to_uint8(pick_shown(x, self.show))

    def to_units(self, x: Tensor) -> NDArray[Any]:
        """Images (..., C, H, W) about [-1, 1] -> values in the data's own units, of `unit_type`.

        The values of an image that became pixels by these rules come back with an error of at most half a step between
        pixels, and whole numbers as whole numbers.
        """
        if self.is_plain and self.depth == 8:
            return to_uint8(x).cpu().numpy()
        kind = self.unit_type
        share = (x.detach().cpu().double().clamp(-1, 1).numpy() + 1) / 2
        pairs = np.array(self.ranges, np.float64)  # (C or 1, 2)
        low, high = (pairs[:, end, None, None] for end in (0, 1))
        values = low + share * (high - low)
        if kind.kind == "f":
            return values.astype(kind)
        if self.depth == 8:  # the middle of the whole numbers that become the same pixel
            middle = low + (share * 255 + 0.5) * (high - low + 1) / 256 - 0.5
            values = np.where(high - low >= 255, middle, values)
        bounds = np.iinfo(kind)
        return np.rint(values.clip(low, high)).clip(bounds.min, bounds.max).astype(kind)

    def _note(self, extremes: Sequence[Range]) -> None:
        if self.value_range is None and not self.is_open:
            return
        outside = find_outside(as_ranges(self.value_range or (0, 0)), extremes)
        if outside and len(self.beyond) < MAX_NOTES:
            self.beyond.append(tuple(extremes))  # atomic, so threads need no lock

    def widen(self) -> Ranges:
        """The ranges that also hold the values noted in `beyond`."""
        chosen = [as_ranges(self.value_range)] if self.value_range else []
        return tuple(choose_common_range(each) for each in zip(*self.beyond, *chosen, strict=True))

    def report_beyond(self) -> Range | None:
        """The lowest and the highest value of the images noted in `beyond`, in channels with values outside; None without any."""
        ranges = self.scaled_ranges
        outside = [pair for extremes in self.beyond for pair in find_outside(ranges, extremes)]
        if not outside:
            return None
        lows, highs = zip(*outside, strict=True)
        return min(lows), max(highs)


def read_settings(data: Mapping[str, Any]) -> PixelRules:
    """The rules that the settings of a dataset, which its images have decided, consist of.

    A setting that is missing, as in runs of earlier versions, has the value that these had.
    """
    value_range = check_value_range(data.get("range"), data.get("channels"))
    return PixelRules(
        None if isinstance(value_range, str) else value_range,
        data.get("alpha") or "white",
        depth=check_depth(data.get("depth")) or 8,
        show=check_show(data.get("show"), data.get("channels") or MAX_CHANNELS),
        number_type=check_number_type(data.get("number_type")),
    )


def check_num_channels(channels: int) -> None:
    """Raise InputError unless data.channels is a number of channels that images can have."""
    if isinstance(channels, bool) or channels not in range(1, MAX_CHANNELS + 1):
        raise InputError(
            f"data.channels={channels} must be a whole number from 1 to {MAX_CHANNELS}, as 3 (RGB) or 1 (grey)"
        )


def check_depth(depth: int | None) -> int | None:
    """data.depth. Raises InputError unless it is 8, 16 or null."""
    if depth is not None and (isinstance(depth, bool) or depth not in DEPTHS):
        raise InputError(
            f"data.depth={depth} must be 8 or 16 bits, or null for what the images need"
        )
    return depth


def check_show(show: int | Sequence[int] | None, channels: int) -> tuple[int, ...] | None:
    """data.show, the channels that pictures show. Raises InputError unless they are one or three of 1 to `channels`."""
    if show is None:
        return None
    numbers = [show] if isinstance(show, int | str) else list(show)
    are_numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not are_numbers or len(numbers) not in (1, 3) or not all(0 < n <= channels for n in numbers):
        raise InputError(
            f"data.show={show} must be one or three of the channels 1 to {channels}, as "
            f"{'[3,2,1]' if channels > 2 else '[1]'}"
        )
    return tuple(numbers)


def check_number_type(number_type: str | None) -> str | None:
    """data.number_type. Raises InputError unless it is one of NUMBER_TYPES or null."""
    if number_type not in (None, *NUMBER_TYPES):
        raise InputError(
            f"data.number_type={number_type} must be one of {', '.join(NUMBER_TYPES)}, or null for that of the images"
        )
    return number_type
