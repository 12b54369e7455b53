"""Images of shapes that tests paint by hand."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from codegrid.evaluation.shape_fitting import FIT_SIDE, Mask

RED, GREEN, BLUE, YELLOW, PINK = (
    (220, 30, 30), (30, 200, 60), (40, 60, 230), (230, 210, 30), (230, 60, 200),
)  # fmt: skip

Point = tuple[float, float]


def polygon(*corners: Point) -> Mask:
    """The pixels within these corners (column, row)."""
    picture = Image.new("1", (FIT_SIDE, FIT_SIDE))
    ImageDraw.Draw(picture).polygon(list(corners), fill=1)
    return np.array(picture)


def bar(left: float, top: float, right: float, bottom: float) -> Mask:
    """An upright rectangle from pixel to pixel, both included."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(column: float, row: float, across: float, down: float, angle: float = 0.0) -> Mask:
    """The pixels of an ellipse with this centre and these half axes."""
    rows, columns = np.mgrid[:FIT_SIDE, :FIT_SIDE]
    x, y = columns - column, rows - row
    along = np.cos(angle) * x + np.sin(angle) * y
    aside = np.cos(angle) * y - np.sin(angle) * x
    inside: Mask = (along / across) ** 2 + (aside / down) ** 2 <= 1
    return inside


def star(column: float, row: float, radius: float, angle: float = 0.0) -> Mask:
    """A star with five points, by its ten corners."""
    turns = np.arange(10) * np.pi / 5 + angle
    lengths = np.where(np.arange(10) % 2, 0.45 * radius, radius)
    corners = zip(column + lengths * np.sin(turns), row + lengths * np.cos(turns), strict=True)
    return polygon(*((float(x), float(y)) for x, y in corners))


def paint(*layers: tuple[Mask, Sequence[int]]) -> NDArray[np.uint8]:
    """An image (3, FIT_SIDE, FIT_SIDE) of masks in colours on black; later ones cover earlier ones."""
    image = np.zeros((FIT_SIDE, FIT_SIDE, 3), np.uint8)
    for mask, colour in layers:
        image[mask] = colour
    return image.transpose(2, 0, 1)
