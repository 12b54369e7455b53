"""Which images of a set validate: a rule that keeps every image on its side when others come or go."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.engine.errors import InputError, check_int, check_range

Rows = NDArray[np.int64]
Names = Sequence[str] | Sequence[int]  # paths below the root, or numbers where images have none

HELD_OUT = ("random", "last")


@dataclass(frozen=True)
class Split:
    """The rising rows of the images of each split, and the boundary between them (see split_by_name)."""

    train: Rows
    val: Rows
    at: float | str | int


def split_by_name(names: Names, n_val: int, how: str, seed: int, at: Any = None) -> Split:
    """Split images by their names alone, so that no image changes sides because another one comes, goes or is listed earlier.

    Each name has a place on a line, and the images beyond a boundary `at` validate:

    random    the place is a number in [0, 1) from a hash of the seed and the name; the images at or below `at` validate
    last      the place is that in the order of the paths or numbers; the image `at` and those after it validate

    Without `at`, the boundary is set so that exactly `n_val` images validate. A run records this boundary, and everything
    that builds on the run applies it again: an image that has trained never validates later, and an image that has
    validated never trains, whatever comes or goes. The count then follows the data: the share `at` of new images validates.
    Taking the n_val smallest hashes each time would keep the count instead, but if validation images were lost, images that
    had trained would replace them.

    Raises InputError if a split would be empty.
    """
    check_held_out(how)
    n = len(names)
    if at is None:
        check_num_held_out(n_val, n)
    if how == "random":
        places = np.array([place_of_name(name, seed) for name in names])
        at = float(np.partition(places, n_val - 1)[n_val - 1]) if at is None else at
        check_range("data.split_at", at, 0, 1)
        validates = places <= at
    else:
        order = sorted(range(n), key=lambda row: _order_of_name(names[row]))
        at = names[order[-n_val]] if at is None else at
        if n and isinstance(names[0], int):
            check_int("data.split_at", at, 0)
        else:
            at = str(at)
        first = _order_of_name(at)
        validates = np.array([_order_of_name(name) >= first for name in names], bool)
    train, val = np.flatnonzero(~validates), np.flatnonzero(validates)
    for split, rows in (("train on", train), ("validate", val)):
        if not len(rows):
            raise InputError(
                f"data.split_at={at} leaves none of the {n:,} images to {split}; give the images that it was recorded for, "
                "or start a new run with data.split_at=null"
            )
    return Split(train, val, at)


def place_of_name(name: str | int, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the name only, uniform over names."""
    return math.ldexp(hash_name(f"{seed}/{name}") >> 11, -53)  # 53 bits, as many as a float has


def hash_name(name: str) -> int:
    """A hash of 64 bits, the same on every machine.

    Unicode is normalised, because file systems spell the same letters differently, and bytes that are no text are kept.
    """
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def hash_names(names: Names) -> NDArray[np.uint64]:
    """The hashes of names (n,); numbers stay what they are."""
    if isinstance(names, range):
        return np.array(names, np.uint64)
    hashes = (name if isinstance(name, int) else hash_name(name) for name in names)
    return np.fromiter(hashes, np.uint64, len(names))


def _order_of_name(name: str | int) -> Any:
    """What the paths of a folder, or the numbers of images, are sorted by."""
    return name if isinstance(name, int) else tuple(name.split("/"))


def check_held_out(how: str) -> None:
    """Raise InputError unless `how` is a way to hold images out."""
    if how not in HELD_OUT:
        raise InputError(f"data.held_out={how} must be {' or '.join(HELD_OUT)}")


def check_num_held_out(n_val: Any, n: int) -> None:
    """Raise InputError unless n_val of n images can be held out."""
    if not isinstance(n_val, int) or not 0 < n_val < n:
        raise InputError(f"data.n_val={n_val} must leave both splits an image; there are {n}")
