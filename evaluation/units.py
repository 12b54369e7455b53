"""What scores refer to: the range and the bits of pixels, and the channels that networks of three colours see."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_float, to_uint8
from codegrid.data.pixels import PixelRules
from codegrid.data.ranges import Range, to_range_setting
from codegrid.data.shown import choose_shown, pick_shown
from codegrid.evaluation.scores import name_channels, write_range


def describe_pixels(rules: PixelRules) -> dict[str, Any]:
    """What the provenance of scores of pixels says: the values of the lowest and the highest pixel in the units of the data, as
    [low, high] or such a pair for each channel, and the bits that pixels are rounded to."""
    ranges = rules.ranges if len(set(rules.ranges)) > 1 else rules.ranges[:1]
    return {"range": to_range_setting(ranges), "depth": rules.depth}


def count_pixel_bits(rules: PixelRules, channels: int) -> int:
    """The bits of a pixel of the data, all channels together.

    At a depth of 16 a channel of whole numbers has as many bits as its range needs, 12 for 0 to 4095. All others have the depth:
    more of the data is in no reconstruction.
    """
    if rules.depth == 8 or rules.unit_type.kind not in "iu":
        return rules.depth * channels
    per_channel = [min(rules.depth, count_range_bits(limits)) for limits in rules.ranges]
    return sum(per_channel) if len(per_channel) > 1 else per_channel[0] * channels


def count_range_bits(limits: Range) -> int:
    """The bits of one of the whole numbers in a range."""
    low, high = limits
    return max(1, (math.floor(high) - math.ceil(low)).bit_length())


def describe_shown(rules: PixelRules, channels: int) -> str:
    """Which channels of the images their pictures show, and which values are black and white there: a sentence for captions.

    Empty for 8-bit images all of whose channels are shown.
    """
    shown = choose_shown(channels, rules.show)
    parts = []
    if len(set(shown)) < channels:
        parts.append(f"{name_channels(shown)} of {channels}")
    elif list(shown) != sorted(shown):
        parts.append(name_channels(shown))
    ranges = rules.ranges if len(rules.ranges) == 1 else [rules.ranges[n - 1] for n in shown]
    if len(set(ranges)) == 1:
        ranges = ranges[:1]
    if not rules.is_plain:
        limits = write_range([list(pair) for pair in ranges])
        parts.append(f"from black to white {limits}")
    return f"Shown: {'; '.join(parts)}." if parts else ""


@dataclass(frozen=True)
class ShownColours:
    """What networks of three colours see of images: the channels that pictures show, in 8 bits."""

    channels: int
    show: tuple[int, ...] | None

    @classmethod
    def of(cls, images: ImageDataModule) -> "ShownColours":
        return cls(images.channels, images.rules.show)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) of either depth -> uint8 (B, 3 or 1, H, W)."""
        shown = pick_shown(pixels, self.show)
        return shown if pixels.element_size() == 1 else to_uint8(to_float(shown))

    def provenance(self) -> dict[str, Any]:
        """The numbers of the channels, counted from 1, where these are not all in their order."""
        shown = choose_shown(self.channels, self.show)
        return {} if shown == tuple(range(1, self.channels + 1)) else {"channels": list(shown)}
