"""The commonest TIFFs without tifffile, which takes five times as long to open them: one page, not packed, in strips that follow
each other."""

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray


class Tag(IntEnum):
    """What is known of a page, by the numbers that TIFF has for it."""

    WIDTH = 256
    LENGTH = 257
    BITS = 258  # of each sample
    COMPRESSION = 259
    PHOTOMETRIC = 262  # how samples become colours
    FILL_ORDER = 266
    DESCRIPTION = 270
    STRIP_OFFSETS = 273
    TURN = 274  # the orientation
    SAMPLES = 277  # of a pixel
    STRIP_COUNTS = 279  # bytes
    PLANES = 284  # 1: the samples of a pixel lie side by side, 2: in planes
    PREDICTOR = 317
    TILE_WIDTH = 322
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339  # 1: unsigned, 2: signed, 3: floating-point
    SLICES = 32997
    NO_DATA = 42113


# What these tags say if a page is plain, or if it lacks them.
USUAL_TAGS = {
    Tag.COMPRESSION: 1, Tag.FILL_ORDER: 1, Tag.TURN: 1, Tag.PREDICTOR: 1, Tag.SLICES: 1,
}  # fmt: skip
RARE_TAGS = {Tag.TILE_WIDTH, Tag.NO_DATA}
NEEDED_TAGS = {Tag.WIDTH, Tag.LENGTH, Tag.PHOTOMETRIC, Tag.STRIP_OFFSETS, Tag.STRIP_COUNTS}
PLAIN_PHOTOMETRICS = ((0,), (1,), (2,))  # grey from white or from black, and RGB or bands
SAMPLE_TYPES = {  # by format and bits
    (1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (1, 64): "u8", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4", (2, 64): "i8",
    (3, 16): "f2", (3, 32): "f4", (3, 64): "f8",
}  # fmt: skip
STRUCT_LETTERS = {1: "B", 2: "s", 3: "H", 4: "I", 16: "Q"}  # of whole numbers and of text
MAX_NUMBERS = 4096  # of a tag
# Descriptions by which ImageJ and tifffile say that further pages follow that have no tags of their own.
FURTHER_PAGES = (b"ImageJ=", b'"truncated": true')

BROKEN = (struct.error, OverflowError)  # what broken tags raise

PageTags = dict[int, tuple[Any, ...]]


def peek_tags(content: bytes) -> tuple[PageTags, int]:
    """The tags of the first page of a TIFF, and where the next page is, 0 without one. Raises one of BROKEN.

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
    tags: PageTags = {}
    for at in range(start, min(end, len(content)), size):
        tag, kind, count, value = struct.unpack_from(order + entry, content, at)
        letter = STRUCT_LETTERS.get(kind)
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
    except BROKEN:
        return None
    if following or any(tags.get(tag, (usual,)) != (usual,) for tag, usual in USUAL_TAGS.items()):
        return None
    if tags.keys() & RARE_TAGS or not tags.keys() >= NEEDED_TAGS:
        return None
    for text in tags.get(Tag.DESCRIPTION, (b"",)) or FURTHER_PAGES:
        if any(mark in text for mark in FURTHER_PAGES):
            return None
    bits, formats, planes = (
        tags.get(Tag.BITS, (1,)),
        tags.get(Tag.SAMPLE_FORMAT, (1,)),
        tags.get(Tag.PLANES, (1,)),
    )
    samples = tags.get(Tag.SAMPLES, (1,))
    is_uniform = len({*bits}) == len({*formats}) == len(planes) == len(samples) == 1
    if (
        not is_uniform
        or (formats[0], bits[0]) not in SAMPLE_TYPES
        or tags[Tag.PHOTOMETRIC] not in PLAIN_PHOTOMETRICS
    ):
        return None
    dtype = np.dtype(SAMPLE_TYPES[formats[0], bits[0]])
    [width], [length] = tags[Tag.WIDTH], tags[Tag.LENGTH]
    size = width * length * samples[0] * dtype.itemsize
    offsets, counts = tags[Tag.STRIP_OFFSETS], tags[Tag.STRIP_COUNTS]
    ends = [start + count for start, count in zip(offsets, counts, strict=False)]
    if (
        len(offsets) != len(counts)
        or [*offsets[1:]] != ends[:-1]
        or sum(counts) != size
        or ends[-1] > len(content)
    ):
        return None
    order: Literal["<", ">"] = "<" if content[:1] == b"I" else ">"
    extra = tags.get(Tag.EXTRA_SAMPLES, ())
    return PlainPage(
        content,
        offsets[0],
        length,
        width,
        samples[0],
        dtype,
        order,
        tags[Tag.PHOTOMETRIC][0],
        extra,
        planes == (2,),
    )
