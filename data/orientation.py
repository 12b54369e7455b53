"""How a camera was held: the Exif orientation of an image."""

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from codegrid.data.form import Form

ORIENTATION = 0x0112  # the tag of Exif and TIFF


def turn_form(form: Form, orientation: int) -> Form:
    """The form of an image that has this one once the Exif orientation is applied."""
    return replace(form, size=form.size[::-1]) if orientation in (5, 6, 7, 8) else form


def apply_orientation(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn and mirror pixels (channels, h, w) as the Exif orientation 1..8 demands; other values change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels
