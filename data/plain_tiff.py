"""The commonest TIFFs without tifffile, which takes five times as long to open them: one page, not packed, in strips that follow
each other; and pages for the bands of a picture, as tifffile writes them."""

import math
import re
import struct
from dataclasses import dataclass, replace
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
NEEDED_TAGS = (Tag.WIDTH, Tag.LENGTH, Tag.PHOTOMETRIC)
# What has one value, or the same for all samples, and what it is if a page lacks it.
UNIFORM_TAGS = {Tag.BITS: 1, Tag.SAMPLE_FORMAT: 1, Tag.PLANES: 1, Tag.SAMPLES: 1}
PLAIN_PHOTOMETRICS = (0, 1, 2)  # grey from white or from black, and RGB or bands
SAMPLE_TYPES = {  # by format and bits
    (1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (1, 64): "u8", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4", (2, 64): "i8",
    (3, 16): "f2", (3, 32): "f4", (3, 64): "f8",
}  # fmt: skip
STRUCT_LETTERS = {1: "B", 2: "s", 3: "H", 4: "I", 16: "Q"}  # of whole numbers and of text
MAX_NUMBERS = 4096  # of a tag
# What tifffile says of an array of three axes.
SHAPED = re.compile(rb'{"shape": \[(\d+), (\d+), (\d+)\]}\0*')
MOST_PAGES = 16  # of a picture
# By what ImageJ and tifffile say that further pages follow, which have no tags of their own.
FURTHER_PAGES = (b"ImageJ=", b'"truncated": true')

BROKEN = (struct.error, OverflowError)  # what broken tags raise

PageTags = dict[int, tuple[Any, ...]]


def peek_tags(content: bytes, page: int | None = None) -> tuple[PageTags, int]:
    """The tags of the first page of a TIFF, or of the `page` at a place of it, and where the next is, 0 without one.

    Raises one of BROKEN.
    Text is one value of a tag. Tags that hold neither it nor whole numbers, or thousands of them, are empty.
    """
    order = "<" if content[:1] == b"I" else ">"
    is_big = b"+" in content[2:4]
    offset_type, count_type, entry = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    [start] = struct.unpack_from(order + offset_type, content, 8 if is_big else 4)
    start = start if page is None else page
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
    """A page of a TIFF whose values are not packed and lie in one piece, with the names that tifffile has for what a page is."""

    content: bytes
    start: int
    imagelength: int
    imagewidth: int
    samplesperpixel: int
    dtype: np.dtype[Any]
    photometric: int
    byteorder: Literal["<", ">"]
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
    def layout(self) -> tuple[Any, ...]:
        """What pages of one series have in common."""
        return self.imagelength, self.imagewidth, self.samplesperpixel, self.dtype, self.photometric

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


@dataclass(frozen=True)
class PlainSeries:
    """Pages of one channel each, as tifffile writes an array (pages, h, w), with the names that it has for a series of them."""

    pages: list[PlainPage]

    kind = "shaped"

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, number: int) -> PlainPage:
        return self.pages[number]

    @property
    def keyframe(self) -> PlainPage:
        return self.pages[0]

    def get_shape(self, squeeze: bool = True) -> tuple[int, int, int]:
        return len(self.pages), self.keyframe.imagelength, self.keyframe.imagewidth

    def get_axes(self, squeeze: bool = True) -> str:
        return "QYX"

    def asarray(self, maxworkers: int = 1) -> NDArray[Any]:
        """The values (pages, h, w), not copied if the pages lie in one piece."""
        first, size = self.keyframe, self.keyframe.asarray().nbytes
        starts = [page.start for page in self.pages]
        if starts != [first.start + i * size for i in range(len(starts))]:
            return np.stack([page.asarray() for page in self.pages])
        length = len(starts) * first.imagelength
        return replace(first, imagelength=length).asarray().reshape(self.get_shape())


def open_plain(content: bytes) -> PlainPage | None:
    """The page of a TIFF that holds nothing else and is not packed; None for other files, which tifffile opens."""
    try:
        tags, following = peek_tags(content)
    except BROKEN:
        return None
    texts = tags.get(Tag.DESCRIPTION, (b"",)) or FURTHER_PAGES
    if following or any(mark in text for text in texts for mark in FURTHER_PAGES):
        return None
    return to_plain_page(content, tags)


def open_plain_series(content: bytes) -> PlainSeries | None:
    """The pages of a TIFF that is an array (pages, h, w) of tifffile, which says so, and not packed; None for other files."""
    try:
        tags, following = peek_tags(content)
        described = SHAPED.fullmatch(*tags.get(Tag.DESCRIPTION, ()) or (b"",))
        if not described or not 1 < int(described[1]) <= MOST_PAGES:
            return None
        pages = [to_plain_page(content, tags)]
        while following and len(pages) < MOST_PAGES:
            tags, following = peek_tags(content, following)
            pages.append(to_plain_page(content, tags))
    except BROKEN:
        return None
    plain = [page for page in pages if page]
    shape = tuple(map(int, described.groups()))
    if following or len(plain) < len(pages) or len({page.layout for page in plain}) > 1:
        return None
    series = PlainSeries(plain)
    return series if series.get_shape() == shape and plain[0].samplesperpixel == 1 else None


def to_plain_page(content: bytes, tags: PageTags) -> PlainPage | None:
    """The page of these tags; None if it is not plain."""
    if any(tags.get(tag, (usual,)) != (usual,) for tag, usual in USUAL_TAGS.items()):
        return None
    if tags.keys() & RARE_TAGS or any(len(tags.get(tag, ())) != 1 for tag in NEEDED_TAGS):
        return None
    numbers = {tag: set(tags.get(tag, (usual,))) for tag, usual in UNIFORM_TAGS.items()}
    if any(len(values) != 1 for values in numbers.values()):
        return None
    [bits], [kind], [planes], [samples] = numbers.values()
    dtype = np.dtype(SAMPLE_TYPES.get((kind, bits), "V1"))
    [width], [length], [photometric] = (tags[tag] for tag in NEEDED_TAGS)
    start = find_values(tags, width * length * samples * dtype.itemsize, len(content))
    if start is None or dtype.kind == "V" or photometric not in PLAIN_PHOTOMETRICS:
        return None
    order: Literal["<", ">"] = "<" if content[:1] == b"I" else ">"
    extra = tags.get(Tag.EXTRA_SAMPLES, ())
    layout = length, width, samples, dtype, photometric
    return PlainPage(content, start, *layout, order, extra, is_planar=planes == 2)


def find_values(tags: PageTags, size: int, end: int) -> int | None:
    """Where the values of a page begin, so many bytes in strips that follow each other; None if they don't."""
    offsets, counts = tags.get(Tag.STRIP_OFFSETS, ()), tags.get(Tag.STRIP_COUNTS, ())
    if not size or len(offsets) != len(counts) or sum(counts) != size:
        return None
    ends = [start + count for start, count in zip(offsets, counts, strict=True)]
    is_whole = [*offsets[1:]] == ends[:-1] and ends[-1] <= end
    return int(offsets[0]) if is_whole else None
