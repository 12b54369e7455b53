"""The embedded dataset: one to five shapes on black, a procedural equivalent of PurdueShapes5GAN.

After A. Kak, "Codebook-Based Learning" (Purdue, 2025): rectangles, triangles, disks, ovals and stars in random places,
orientations and colours. A shape is rotated by moving each of its pixels to its new, rounded place without interpolation.
This leaves tiny holes, which a good tokenizer must reproduce. A second dataset has the outlines of the same images.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.form import Form
from codegrid.data.source import ImageBatch, Source
from codegrid.data.tables import refuse_column
from codegrid.engine.errors import InputError

MAX_SHAPES = 5  # in one image
SHAPES_VERSION = 1  # part of the cache key: increase it when drawing gives other pixels
OUTLINES_VERSION = 1  # the same of outlines
RADIUS = (12.0, 28.0)  # half the extent of a shape, in pixels of a 64x64 image
MIN_ASPECT = 0.35  # of 1
CENTRES = (0.12, 0.88)  # where centres of shapes lie, from edge to edge of the image
STAR_NOTCH = 0.45  # of a star's radius: how far its notches are from its centre
LEAST_LEVEL = 102  # of the brightest channel of a shape's colour, in 8 bits
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow
LEAST_EDGE = (
    24  # between neighbouring pixels of 8 bits, in any channel, from which on there is an outline
)
_SPLIT_STREAMS = {"train": 0, "val": 1}

Array = NDArray[np.float32]


def _rectangle(u: Array, v: Array, r: Array, a: Array) -> NDArray[np.bool_]:
    return (np.abs(u) <= r) & (np.abs(v) <= r * a)


def _triangle(u: Array, v: Array, r: Array, a: Array) -> NDArray[np.bool_]:
    return (v <= r) & (np.abs(u) * 2 <= (v + r) * (0.6 + 0.4 * a))


def _disk(u: Array, v: Array, r: Array, a: Array) -> NDArray[np.bool_]:
    return u * u + v * v <= r * r * (0.5 + 0.5 * a) ** 2


def _oval(u: Array, v: Array, r: Array, a: Array) -> NDArray[np.bool_]:
    return u * u + (v / (0.3 + 0.4 * a)) ** 2 <= r * r


def _star(u: Array, v: Array, r: Array, a: Array) -> NDArray[np.bool_]:
    # In polar coordinates, the edge of a five-pointed star is a straight line from each tip to the next notch.
    tip, notch, half = r, STAR_NOTCH * r, np.pi / 5
    angle = np.abs((np.arctan2(u, v) + half) % (2 * half) - half)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    end_along, end_across = notch * np.cos(half), notch * np.sin(half)
    return across * (tip - end_along) <= (tip - along) * end_across


SHAPES: tuple[Callable[[Array, Array, Array, Array], NDArray[np.bool_]], ...] = (
    _rectangle, _triangle, _disk, _oval, _star,
)  # fmt: skip


def _draw_parameters(
    seed: int, split: str, indices: Sequence[int]
) -> tuple[NDArray[np.int64], Array]:
    """The number of shapes of each image (n,) and their parameters (n, MAX_SHAPES, 8), drawn from one stream per image.

    The parameters are uniform in [0, 1): kind, radius, aspect, angle, column, row, hue, brightness.
    """
    counts = np.empty(len(indices), np.int64)
    parameters = np.empty((len(indices), MAX_SHAPES, 8), np.float32)
    for row, index in enumerate(indices):
        generator = np.random.default_rng((seed, _SPLIT_STREAMS[split], index))
        counts[row] = generator.integers(1, MAX_SHAPES + 1)
        parameters[row] = generator.random((MAX_SHAPES, 8), np.float32)
    return counts, parameters


def draw_shapes(
    seed: int, split: str, indices: Sequence[int], size: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 3, size, size) and labels (n,), the number of shapes minus one.

    An image depends on (seed, split, index) only. The two splits draw from separate streams and share no image.
    """
    counts, parameters = _draw_parameters(seed, split, indices)
    images = np.empty((len(indices), 3, size, size), np.uint8)
    block = max(1, 512**2 // size**2)  # the number of images that fit into the cache of a core
    for start in range(0, len(indices), block):
        rows = slice(start, start + block)
        images[rows] = _paint(counts[rows], parameters[rows], size)
    return images, counts - 1


def _paint(counts: NDArray[np.int64], parameters: Array, size: int) -> NDArray[np.uint8]:
    """Images (n, 3, size, size) with `counts` (n,) shapes of these parameters (n, MAX_SHAPES, 8)."""
    unit = size / 64
    reach = int(np.ceil(RADIUS[1] * unit))
    u = np.arange(-reach, reach + 1, dtype=np.float32)
    v = u[:, None]
    # (8, MAX_SHAPES, n, 1, 1), to be broadcast against the (2 reach + 1, 2 reach + 1) of a stencil
    p = parameters.T[..., None, None]
    radius = (RADIUS[0] + p[1] * (RADIUS[1] - RADIUS[0])) * unit
    aspect = MIN_ASPECT + p[2] * (1 - MIN_ASPECT)
    stencils = np.empty((MAX_SHAPES, len(counts), u.size, u.size), bool)
    present = np.arange(MAX_SHAPES)[:, None] < counts
    kinds = np.where(present, (parameters.T[0] * len(SHAPES)).astype(int), -1)
    for kind, inside in enumerate(SHAPES):
        of_kind = kinds == kind
        stencils[of_kind] = inside(u, v, radius[of_kind], aspect[of_kind])
    angle = 2 * np.pi * p[3]
    cos, sin = np.cos(angle), np.sin(angle)
    left, top = (CENTRES[0] + p[4:6] * (CENTRES[1] - CENTRES[0])) * size
    margin = int(np.ceil(np.sqrt(2) * reach))  # for the pixels that rotation moves over the edge
    side = size + 2 * margin
    # A spare fourth byte lets a pixel be written as one uint32.
    canvas = np.zeros((len(counts), side, side, 4), np.uint8)
    pixels = canvas.view(np.uint32).reshape(-1)
    corners = (np.arange(len(counts)) * side + margin) * side + margin
    colours = np.zeros((len(counts), MAX_SHAPES, 4), np.uint8)
    colours[..., :3] = _to_rgb(parameters[..., 6:8])
    for slot in range(MAX_SHAPES):  # later shapes cover earlier ones
        rows = np.flatnonzero(counts > slot)
        stencil = stencils[slot, rows]
        area = stencil.sum((1, 2), np.int32)
        # Row and column as one number. float32 is exact up to 2^24, which is enough for 2,000 pixels a side.
        place = np.rint(top[slot, rows] + sin[slot, rows] * u + cos[slot, rows] * v) * side
        place += np.rint(left[slot, rows] + cos[slot, rows] * u - sin[slot, rows] * v)
        index = np.repeat(corners[rows], area) + place[stencil].astype(np.intp)
        pixels[index] = np.repeat(colours.view(np.uint32)[rows, slot, 0], area)
    return canvas[:, margin:-margin, margin:-margin, :3].transpose(0, 3, 1, 2)


def _count_shapes(counts: NDArray[np.int64], parameters: Array) -> Array:
    """The number of shapes (n,), those that others cover included."""
    return counts.astype(np.float32)


def _count_kinds(counts: NDArray[np.int64], parameters: Array) -> Array:
    """The number of shapes of each kind (n, 5), in the order of SHAPES."""
    kinds = (parameters[..., 0] * len(SHAPES)).astype(int)
    present = np.arange(MAX_SHAPES) < counts[:, None]
    of_kind = (kinds[..., None] == np.arange(len(SHAPES))) & present[..., None]
    return of_kind.sum(1).astype(np.float32)


SHAPE_COLUMNS: Mapping[str, Callable[[NDArray[np.int64], Array], Array]] = {
    "count": _count_shapes,
    "kinds": _count_kinds,
}


def draw_outlines(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (n, 3, h, w) -> white lines one pixel wide, on black, where neighbouring pixels differ.

    The holes that rotation leaves are closed first, bright ones opened: by the largest of 3 x 3 pixels, then the smallest, and the
    other way round.
    """
    for reduce in (np.maximum, np.minimum, np.minimum, np.maximum):
        images = _reduce_neighbours(images, reduce)
    steps = np.zeros((images.shape[0], *images.shape[2:]), bool)
    signed = images.astype(np.int16)
    down = np.abs(np.diff(signed, axis=2)).max(1) >= LEAST_EDGE
    right = np.abs(np.diff(signed, axis=3)).max(1) >= LEAST_EDGE
    steps[:, :-1] |= down
    steps[:, :, :-1] |= right
    return np.broadcast_to(steps[:, None] * np.uint8(255), images.shape).copy()


def _reduce_neighbours(images: NDArray[np.uint8], reduce: np.ufunc) -> NDArray[np.uint8]:
    """The largest or smallest of the 3 x 3 pixels around each, as many of them as lie in the image."""
    for axis in (2, 3):
        padded = np.pad(images, [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (3 - axis), mode="edge")
        n = images.shape[axis]
        before, here, after = (
            np.take(padded, range(start, start + n), axis=axis) for start in range(3)
        )
        images = reduce(reduce(before, here), after)
    return images


def _to_rgb(uniform: Array) -> NDArray[np.uint8]:
    """Uniform hue and brightness (..., 2) -> RGB (..., 3), never too dark to be visible on black."""
    hue, value = uniform[..., :1] * 6, 0.4 + 0.6 * uniform[..., 1:]
    ramp = np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1
    return np.rint(255 * value * (0.15 + 0.85 * ramp.clip(0, 1))).astype(np.uint8)


class ShapeSource(Source):
    """n images of a split, drawn on each access."""

    use_threads = False  # slower, because numpy's operations are too small here

    def __init__(self, n: int, seed: int, split: str, further: Sequence[str] = ()) -> None:
        """`further` are those of SHAPE_COLUMNS that stay with the images."""
        super().__init__(n, self.make_key(n, seed, split))
        self.seed = seed
        self.split = split
        self.further = further
        self.numbering = {"shapes": SHAPES_VERSION, "seed": seed}

    def make_key(self, n: int, seed: int, split: str) -> dict[str, Any]:
        """What the images depend on."""
        return {"shapes": SHAPES_VERSION, "seed": seed, "split": split, "n": n}

    @cached_property
    def columns(self) -> Mapping[str, NDArray[Any]]:  # type: ignore[override]
        if not self.further:
            return {}
        counts, parameters = _draw_parameters(self.seed, self.split, range(self.n))
        return {name: SHAPE_COLUMNS[name](counts, parameters) for name in self.further}

    def draw(
        self, indices: Sequence[int], side: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (n, 3, side, side) and labels (n,)."""
        return draw_shapes(self.seed, self.split, indices, side)

    def read_batch(self, indices: Sequence[int], form: Form) -> ImageBatch:
        side = max(form.size)  # of the square whose middle a rectangle is
        images, labels = self.draw(indices, side)
        top, left = ((side - length) // 2 for length in form.size)
        images = images[:, :, top : top + form.size[0], left : left + form.size[1]]
        if form.channels == 1:
            images = np.rint(np.tensordot(LUMA, images, ([0], [1])))[:, None].astype(np.uint8)
        return images, labels, {}

    def read_image(self, index: int, form: Form) -> tuple[NDArray[np.uint8], int]:
        images, labels, _ = self.read_batch([index], form)
        return images[0], int(labels[0])


class OutlineSource(ShapeSource):
    """The outlines of the images of a ShapeSource."""

    def make_key(self, n: int, seed: int, split: str) -> dict[str, Any]:
        return {"outlines": OUTLINES_VERSION, **super().make_key(n, seed, split)}

    def draw(
        self, indices: Sequence[int], side: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images, labels = super().draw(indices, side)
        return draw_outlines(images), labels


class DrawnShapes(ImageDataModule):
    """Images that are drawn from shapes. The label is the number of shapes minus one; SHAPE_COLUMNS says more about each image."""

    label_settings: ClassVar[Sequence[str]] = ("columns", "column_names")
    source_class: ClassVar[type[ShapeSource]] = ShapeSource
    classes = [f"{n} shape{'s' if n > 1 else ''}" for n in range(1, MAX_SHAPES + 1)]

    def __init__(self, n_train: int, n_val: int, **image_settings: Any) -> None:
        super().__init__(**image_settings)
        if self.channels not in (1, 3):
            raise InputError(
                f"data.channels={self.channels}: shapes are painted in colours; use 3, or 1 for grey"
            )
        if min(n_train, n_val) < 1:
            raise InputError(f"data.n_train={n_train} and data.n_val={n_val} must be at least 1")
        self.sizes = {"train": n_train, "val": n_val}
        for name in self.labelling.columns:
            if name not in SHAPE_COLUMNS:
                raise refuse_column("data.columns", name, f"data={self.title}", list(SHAPE_COLUMNS))

    def open_source(self, split: str) -> Source:
        return self.source_class(self.sizes[split], self.seed, split, self.labelling.columns)


class Shapes(DrawnShapes):
    """Shapes on black, drawn in seconds."""


class Outlines(DrawnShapes):
    """The outlines of the images of Shapes with the same seed, white on black; image i of each is of the same shapes."""

    source_class = OutlineSource
