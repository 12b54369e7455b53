"""The embedded dataset: one to five shapes on black, a procedural equivalent of PurdueShapes5GAN.

After A. Kak, "Codebook-Based Learning" (Purdue, 2025): rectangle, triangle, disk, oval and star at random places,
orientations and colours. A shape is turned by sending each of its pixels to its new place, rounded, without
interpolation, and so it gets the tiny holes that a good tokenizer must reproduce.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.loading import Samples
from data.store import Arrays

MOST = 5  # shapes in one image, at most
VERSION = 1  # part of the cache's key: raise it when the pixels of an image change
RADIUS = (12.0, 28.0)  # half the extent of a shape, in pixels of a 64x64 image
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's grey
_SPLITS = {"train": 0, "val": 1}

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
    # A five-pointed star in polar coordinates: its edge is a straight line from each tip to the next notch.
    tip, notch, half = r, 0.45 * r, np.pi / 5
    angle = np.abs((np.arctan2(u, v) + half) % (2 * half) - half)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    end_along, end_across = notch * np.cos(half), notch * np.sin(half)
    return across * (tip - end_along) <= (tip - along) * end_across


SHAPES: tuple[Callable[[Array, Array, Array, Array], NDArray[np.bool_]], ...] = (
    _rectangle, _triangle, _disk, _oval, _star,
)  # fmt: skip


def _parameters(seed: int, split: str, indices: range) -> tuple[NDArray[np.int64], Array]:
    """The number of shapes of each image (n,) and their parameters (n, MOST, 8), each image from its own stream."""
    counts = np.empty(len(indices), np.int64)
    drawn = np.empty((len(indices), MOST, 8), np.float32)
    for row, index in enumerate(indices):
        stream = np.random.default_rng((seed, _SPLITS[split], index))
        counts[row] = stream.integers(1, MOST + 1)
        drawn[row] = stream.random((MOST, 8), np.float32)
    return counts, drawn


def draw(seed: int, split: str, indices: range, size: int = 64) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 3, size, size) and labels (n,), the number of shapes minus one.

    A function of (seed, split, index) alone. The two splits draw from separate streams and share no image.
    """
    counts, drawn = _parameters(seed, split, indices)
    canvas = np.zeros((len(indices), size, size, 3), np.uint8)
    pixels = canvas.reshape(-1, 3)
    unit = size / 64
    reach = int(np.ceil(RADIUS[1] * unit))
    v, u = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32).reshape(2, -1)
    for slot in range(MOST):  # later shapes lie over earlier ones
        kinds = (drawn[:, slot, 0] * len(SHAPES)).astype(int)
        for kind, inside in enumerate(SHAPES):
            rows = np.flatnonzero((counts > slot) & (kinds == kind))
            p = drawn[rows, slot][:, :, None]  # (n, 8, 1) against the (pixels,) of a stencil
            radius = (RADIUS[0] + p[:, 1] * (RADIUS[1] - RADIUS[0])) * unit
            image, point = np.nonzero(inside(u, v, radius, 0.35 + 0.65 * p[:, 2]))
            turn = 2 * np.pi * p[image, 3, 0]
            cos, sin = np.cos(turn), np.sin(turn)
            place = (0.12 + 0.76 * p[image, 4:6, 0]) * size
            x = np.rint(place[:, 0] + cos * u[point] - sin * v[point]).astype(np.int64)
            y = np.rint(place[:, 1] + sin * u[point] + cos * v[point]).astype(np.int64)
            seen = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            colours = _colours(drawn[rows, slot, 6:8])
            pixels[(rows[image] * size + y)[seen] * size + x[seen]] = colours[image[seen]]
    return np.ascontiguousarray(canvas.transpose(0, 3, 1, 2)), counts - 1


def _colours(uniform: Array) -> NDArray[np.uint8]:
    """Hue from the first number, brightness from the second: (n, 2) -> (n, 3), never too dark to be seen on black."""
    hue, value = uniform[:, :1] * 6, 0.4 + 0.6 * uniform[:, 1:]
    ramp = np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1
    return np.rint(255 * value * (0.15 + 0.85 * ramp.clip(0, 1))).astype(np.uint8)


class Shapes(ImageDataModule):
    """Shapes on black (see above): drawn in seconds, then kept as uint8 under `cache_dir`. Label: how many, minus one."""

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        n_train: int = 20_000,
        n_val: int = 1_000,
        seed: int = 0,
        cache_dir: str = "cache",
        batch_size: int = 32,
        flip: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(image_size, channels, batch_size, flip, num_workers, seed, cache_dir)
        if min(n_train, n_val) < 1:
            raise InputError(f"data.n_train={n_train} and data.n_val={n_val} must be at least 1")
        self.counts = {"train": n_train, "val": n_val}

    def load(self, split: str) -> Samples:
        n = self.counts[split]

        def fill(arrays: Arrays) -> None:
            for start in range(0, n, 500):
                part = range(start, min(start + 500, n))
                images, labels = draw(self.seed, split, part, self.image_size)
                if self.channels == 1:
                    images = np.rint(np.tensordot(LUMA, images, ([0], [1])))[:, None].astype(np.uint8)
                arrays["images"][part.start : part.stop], arrays["labels"][part.start : part.stop] = images, labels

        return self.cached(f"shapes-{split}", {"shapes": VERSION, "seed": self.seed, "split": split}, n, fill)
