"""The commonest TIFFs without tifffile, which takes five times as long to open them: one page, not packed, in strips that follow
each other."""

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

# Tags of a page.
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, DESCRIPTION = (
    256,
    257,
    258,
    259,
    262,
    266,
    270,
)
OFFSETS, TURN, SAMPLES, COUNTS, PLANES, PREDICTOR = 273, 274, 277, 279, 284, 317
TILE_WIDTH, EXTRA, FORMAT, SLICES, NODATA = 322, 338, 339, 32997, 42113

USUAL = {
    COMPRESSION: 1,
    FILL_ORDER: 1,
    TURN: 1,
    PREDICTOR: 1,
    SLICES: 1,
}  # what else is left to tifffile
UNUSUAL = {TILE_WIDTH, NODATA}
NEEDED = {WIDTH, LENGTH, PHOTOMETRIC, OFFSETS, COUNTS}
PLAIN_COLOURS = ((0,), (1,), (2,))  # grey from white or from black, and RGB or bands
TYPES = {  # by format and bits
    (1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (1, 64): "u8", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4", (2, 64): "i8",
    (3, 16): "f2", (3, 32): "f4", (3, 64): "f8",
}  # fmt: skip
LETTERS = {1: "B", 2: "s", 3: "H", 4: "I", 16: "Q"}  # of whole numbers and of text, for struct
MAX_NUMBERS = 4096  # of a tag
# Descriptions by which ImageJ and tifffile say that further pages follow that have no tags of their own.
FURTHER_PAGES = (b"ImageJ=", b'"truncated": true')

Tags = dict[int, tuple[Any, ...]]


def peek_tags(content: bytes) -> tuple[Tags, int]:
    """The tags of the first page of a TIFF, and where the next page is, 0 without one. Raises struct.error for a broken file.

    Text is one value of a tag. Tags that hold neither it nor whole numbers, or thousands of them, are empty.
    """
    order = "<" if content[:1] == b"I" else ">"
    is_big = b"+" in content[2:4]
    offset_type, count_type, entry = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    [start] = struct.unpack_from(order + offset_type, content, 8 if is_big else 4)
    [n] = struct.unpack_from(order + count_type, content, start)
    start += struct.calcsize(order + count_type)
    size = struct.calcsize(order + entry)
    end = start + n * size
    tags: Tags = {}
    for at in range(start, min(end, len(content)), size):
        tag, kind, count, value = struct.unpack_from(order + entry, content, at)
        letter = LETTERS.get(kind)
        if letter is None or count > MAX_NUMBERS:
            tags[tag] = ()
            continue
        place = at + size - len(value)
        if count * struct.calcsize(order + letter) > len(value):
            [place] = struct.unpack_from(order + offset_type, content, place)
        tags[tag] = struct.unpack_from(f"{order}{count}{letter}", content, place)
    [following] = struct.unpack_from(order + offset_type, content, end)
    return tags, following


@dataclass(frozen=True)
class PlainPage:
    """The only page of a TIFF whose values are not packed and lie in one piece, with the names that tifffile has for what a
    page is."""

    content: bytes
    start: int
    imagelength: int
    imagewidth: int
    samplesperpixel: int
    dtype: np.dtype[Any]
    byteorder: Literal["<", ">"]
    photometric: int
    extrasamples: tuple[int, ...]
    is_planar: bool

    imagedepth = 1
    predictor = 1
    chunked = (1,)
    tags: ClassVar[dict[int, Any]] = {}  # such pages are upright, and mark no missing data

    @property
    def keyframe(self) -> "PlainPage":
        return self

    @property
    def bitspersample(self) -> int:
        return 8 * self.dtype.itemsize

    @property
    def dataoffsets(self) -> tuple[int, ...]:
        return (self.start,)

    @property
    def axes(self) -> str:
        if self.samplesperpixel == 1:
            return "YX"
        return "SYX" if self.is_planar else "YXS"

    def asarray(self, maxworkers: int = 1) -> NDArray[Any]:
        """The values, by the axes. They are not copied, and can't be written to."""
        lengths = {"Y": self.imagelength, "X": self.imagewidth, "S": self.samplesperpixel}
        shape = [lengths[axis] for axis in self.axes]
        stored = self.dtype.newbyteorder(self.byteorder)
        values = np.frombuffer(self.content, stored, math.prod(shape), self.start).reshape(shape)
        return values if values.flags.aligned else values.copy()


def open_plain(content: bytes) -> PlainPage | None:
    """The page of a TIFF that holds nothing else and is not packed; None for other files, which tifffile opens."""
    try:
        tags, following = peek_tags(content)
    except struct.error:
        return None
    if following or any(tags.get(tag, (usual,)) != (usual,) for tag, usual in USUAL.items()):
        return None
    if tags.keys() & UNUSUAL or not tags.keys() >= NEEDED:
        return None
    for text in tags.get(DESCRIPTION, (b"",)) or FURTHER_PAGES:
        if any(mark in text for mark in FURTHER_PAGES):
            return None
    bits, formats, planes = tags.get(BITS, (1,)), tags.get(FORMAT, (1,)), tags.get(PLANES, (1,))
    samples = tags.get(SAMPLES, (1,))
    is_uniform = len({*bits}) == len({*formats}) == len(planes) == len(samples) == 1
    if (
        not is_uniform
        or (formats[0], bits[0]) not in TYPES
        or tags[PHOTOMETRIC] not in PLAIN_COLOURS
    ):
        return None
    dtype = np.dtype(TYPES[formats[0], bits[0]])
    [width], [length] = tags[WIDTH], tags[LENGTH]
    size = width * length * samples[0] * dtype.itemsize
    offsets, counts = tags[OFFSETS], tags[COUNTS]
    ends = [start + count for start, count in zip(offsets, counts, strict=False)]
    if (
        len(offsets) != len(counts)
        or [*offsets[1:]] != ends[:-1]
        or sum(counts) != size
        or ends[-1] > len(content)
    ):
        return None
    order: Literal["<", ">"] = "<" if content[:1] == b"I" else ">"
    extra = tags.get(EXTRA, ())
    return PlainPage(
        content,
        offsets[0],
        length,
        width,
        samples[0],
        dtype,
        order,
        tags[PHOTOMETRIC][0],
        extra,
        planes == (2,),
    )
