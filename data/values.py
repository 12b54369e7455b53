"""The values of an image as its file has them -> pixels of one form."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules
from codegrid.data.resize import fit_pixels
from codegrid.data.scaling import mask_numbers

# Pixels; as RGB they take 800 MB while an image is resized. Large JPEGs are downscaled while they are decoded.
MAX_PIXELS = 2**28
GREY_WEIGHTS = (
    19595,
    38470,
    7471,
)  # of 2^16: what red, green and blue weigh in grey (ITU-R BT.601)


class UnreadableImage(Exception):
    """The content is not an image, or a broken one; the message gives the reason in a few words."""


@dataclass(frozen=True)
class Values:
    """The content of an image file, upright.

    array     (h, w, c) of the file's own type and byte order of this machine: whole numbers or floats
    alpha     the last channel says what is transparent, and is no data
    note      how the file was read where there was a choice, in a few words for the summary; empty without one
    missing   the value by which the file itself marks pixels without data; None without one
    """

    array: NDArray[Any]
    alpha: bool = False
    note: str = ""
    missing: float | None = None


def values_to_pixels(values: Values, form: Form, rules: PixelRules) -> NDArray[Any]:
    """Values -> pixels (channels, h, w) of a form, of the type of the rules.

    Values are scaled by the rules, alpha is blended with white or left out, the whole is brought to the size, and then grey is
    repeated for three channels or three become grey. Raises UnreadableImage if the channels don't fit the form.
    """
    colours = values.array.shape[2] - values.alpha
    check_channels(colours, form.channels, values.note)
    array = values.array[..., :colours]
    if (colours, form.channels, len(rules.scaled_ranges)) == (1, 3, 3):  # a range for each colour
        array = np.repeat(array, 3, 2)
    pixels = scale_values(array, rules, values.missing)
    if values.alpha and rules.alpha == "white":
        pixels = blend_with_white(pixels, values.array[..., -1])
    pixels = fit_pixels(pixels, form.size, form.fit)
    if (colours, form.channels) == (3, 1):
        pixels = mix_grey(pixels)
    pixels = pixels.transpose(2, 0, 1)
    return np.repeat(pixels, 3, 0) if (len(pixels), form.channels) == (1, 3) else pixels


def fits_channels(colours: int, channels: int) -> bool:
    """Whether an image of so many channels can become one of `channels`: only grey and RGB are converted."""
    return colours == channels or (colours, channels) in ((1, 3), (3, 1))


def check_channels(colours: int, channels: int, note: str = "") -> None:
    """Raise UnreadableImage if an image of so many channels can't become one of `channels`."""
    if not fits_channels(colours, channels):
        words = f"{colours} channel{'s' * (colours != 1)}{f', {note}' if note else ''}"
        raise UnreadableImage(f"{words}, where data.channels={channels}")


def check_num_pixels(width: int, height: int) -> None:
    """Raise UnreadableImage for an image that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than 2^28")


def scale_values(
    values: NDArray[Any], rules: PixelRules, missing: float | None = None
) -> NDArray[Any]:
    """Values (h, w, c) as pixels of the rules. Values of 8 bits are pixels already."""
    if values.dtype == np.uint8:
        return rules.deepen(values)
    check_range_known(values, rules)
    if len(rules.scaled_ranges) not in (1, values.shape[-1]):
        num_pairs = len(rules.scaled_ranges)
        raise UnreadableImage(
            f"{values.shape[-1]} channels, where data.range has {num_pairs} pairs"
        )
    return rules.scale(values, missing)


def check_range_known(values: NDArray[Any], rules: PixelRules) -> None:
    """Raise UnreadableImage if no rule says what becomes black and white."""
    if not rules.is_open and rules.value_range is None:
        if values.dtype.kind == "f":
            raise UnreadableImage("floating-point pixels, whose range is not known")
        if values.min() < 0 or values.max() >= 2**16:
            raise UnreadableImage("32-bit pixels, whose range is not known")
    if values.dtype.kind == "f" and not mask_numbers(values).any():
        raise UnreadableImage("no pixel is a number")


def blend_with_white(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Pixels (h, w, 1 or 3) of which as much is left as `alpha` (h, w) says, of its type's largest value; the rest is white."""
    if pixels.dtype == np.uint8:  # by Pillow, whose rounding earlier runs have
        mask = (alpha >> 8 * (alpha.itemsize - 1)).astype(np.uint8)
        layers = Image.fromarray(np.dstack([pixels, mask])).convert("RGBA")
        blended = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
        return np.asarray(blended)[..., : pixels.shape[2]]
    white = np.iinfo(pixels.dtype).max
    opacity = alpha[..., None] / np.iinfo(alpha.dtype).max
    return np.rint(white - (white - pixels) * opacity).astype(pixels.dtype)


def mix_grey(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels (h, w, 3) -> (h, w, 1), weighed and rounded as Pillow does."""
    mixed = pixels.astype(np.int64) @ np.array(GREY_WEIGHTS)
    return ((mixed + 2**15) >> 16).astype(pixels.dtype)[..., None]
