"""The values of an image as its file has them -> pixels of one form."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules, mask_numbers
from codegrid.data.resize import fit_pixels

LUMA = (19595, 38470, 7471)  # of 2^16: what red, green and blue weigh in grey (ITU-R BT.601)


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

    Values are scaled by the rules first, then alpha is blended with white or left out, grey is repeated for three channels or
    three become grey, and the whole is brought to the size. Raises UnreadableImage if the channels don't fit the form.
    """
    colours = values.array.shape[2] - values.alpha
    if colours != form.channels and (colours, form.channels) not in ((1, 3), (3, 1)):
        count = values.array.shape[2]
        raise UnreadableImage(
            f"{count} channel{'s' * (count != 1)}, where data.channels={form.channels}"
        )
    check_range_known(values.array[..., :colours], rules)
    pixels: NDArray[Any] = rules.scale(values.array[..., :colours])
    if values.alpha and rules.alpha == "white":
        pixels = blend_with_white(pixels, values.array[..., -1:])
    if (colours, form.channels) == (3, 1):
        pixels = mix_grey(pixels)
    pixels = fit_pixels(pixels, form.size, form.fit).transpose(2, 0, 1)
    return np.repeat(pixels, 3, 0) if (colours, form.channels) == (1, 3) else pixels


def check_range_known(values: NDArray[Any], rules: PixelRules) -> None:
    """Raise UnreadableImage if no rule says what becomes black and white."""
    if not rules.is_open and rules.value_range is None:
        if values.dtype.kind == "f":
            raise UnreadableImage("floating-point pixels, whose range is not known")
        if values.min() < 0 or values.max() >= 2**16:
            raise UnreadableImage("32-bit pixels, whose range is not known")
    if values.size and not mask_numbers(values).any():
        raise UnreadableImage("no pixel is a number")


def blend_with_white(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Pixels (h, w, c) of which as much is left as `alpha` (h, w, 1) says, of its type's largest value; the rest is white."""
    opacity = alpha.astype(np.float64) / np.iinfo(alpha.dtype).max
    white = np.iinfo(pixels.dtype).max
    return np.rint(white - (white - pixels) * opacity).astype(pixels.dtype)


def mix_grey(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels (h, w, 3) -> (h, w, 1), weighed and rounded as Pillow does."""
    mixed = pixels.astype(np.int64) @ np.array(LUMA)
    return ((mixed + 2**15) >> 16).astype(pixels.dtype)[..., None]
