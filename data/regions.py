"""Boxes cut out of pictures, which are read without the rest where their files allow it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from codegrid.data.arrays import (
    NPY,
    ZIP,
    ArrayHeader,
    Axes,
    choose_axes,
    map_array,
    open_array,
    read_header,
    to_plain_type,
)
from codegrid.data.decode import decode, measure_image
from codegrid.data.dicom import is_dicom, read_dicom_header
from codegrid.data.form import Form
from codegrid.data.orientation import ORIENTATION, turn_form
from codegrid.data.pieces import held_pieces
from codegrid.data.pixels import PixelRules
from codegrid.data.resize import fit_pixels
from codegrid.data.tiff import (
    BANDS,
    BLACK_IS_ZERO,
    MULTIPLIED,
    RGB,
    ROWS,
    MissingCodec,
    TiffLayout,
    choose_samples,
    describe_codec,
    divide_by_alpha,
    is_pillows,
    is_tiff,
    lay_out,
    open_tiff,
    read_no_data,
)
from codegrid.data.values import (
    UnreadableImage,
    Values,
    check_channels,
    check_num_pixels,
    values_to_pixels,
)
from codegrid.engine.sizes import Size

YCBCR, JPEG_CODES = 6, (6, 7, 34892, 33007)  # a photometric interpretation, and compressions
OPEN_PICTURES = 64  # whose headers are held in memory


@dataclass(frozen=True)
class PixelBox:
    """A part of a picture: its upper left pixel and its size."""

    top: int
    left: int
    size: Size

    @property
    def bottom(self) -> int:
        return self.top + self.size[0]

    @property
    def right(self) -> int:
        return self.left + self.size[1]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class FileId:
    """A file, and what tells that it is still the same: its size and its time."""

    path: Path
    stamp: tuple[int, int]


class LargePicture(ABC):
    """A picture in a file, of `size` (rows, columns), upright."""

    def __init__(self, file: FileId, size: Size) -> None:
        self.file = file
        self.size = size

    @abstractmethod
    def read(self, box: PixelBox, form: Form, rules: PixelRules) -> NDArray[Any]:
        """A box as pixels of a form. Raises UnreadableImage."""


class DirectPicture(LargePicture):
    """A picture of which a box is read without the rest."""

    @abstractmethod
    def read_values(self, box: PixelBox) -> Values:
        """The values of a box. Raises UnreadableImage."""

    def read(self, box: PixelBox, form: Form, rules: PixelRules) -> NDArray[Any]:
        return values_to_pixels(self.read_values(box), form, rules)


class ArrayPicture(DirectPicture):
    """A .npy file, of which a memory map shows what is asked for."""

    def __init__(self, file: FileId, header: ArrayHeader, axes: Axes) -> None:
        super().__init__(file, axes.size)
        self.header = header
        self.axes = axes

    def read_values(self, box: PixelBox) -> Values:
        array = self.axes.to_channels_last(map_array(self.file.path, self.header))
        return Values(to_plain_type(np.array(array[box.slices])), note=self.axes.note)


class MappedTiff(DirectPicture):
    """A TIFF whose values lie in one piece, not compressed: `shape` has the axes `order`, of "RCS" for rows, columns, samples."""

    def __init__(
        self, file: FileId, size: Size, samples: "Samples", header: ArrayHeader, order: str
    ) -> None:
        super().__init__(file, size)
        self.samples = samples
        self.header = header
        self.order = order

    def read_values(self, box: PixelBox) -> Values:
        array = map_array(self.file.path, self.header)
        array = array.transpose([self.order.index(axis) for axis in "RCS"])
        return self.samples.take(np.array(array[box.slices]))


class SegmentedTiff(DirectPicture):
    """A TIFF of tiles or strips, of which those are decoded that a box lies in."""

    def __init__(self, file: FileId, layout: TiffLayout, samples: "Samples") -> None:
        super().__init__(file, layout.size)
        self.samples = samples
        self.pages = [Segments(file, number, page) for number, page in enumerate(layout.pages)]

    def read_values(self, box: PixelBox) -> Values:
        parts = [page.read(box) for page in self.pages]
        return self.samples.take(np.concatenate(parts, 2))


class WholePicture(LargePicture):
    """A picture that is decoded whole, and stays in memory as long as there is room for it."""

    def __init__(self, file: FileId, size: Size, channels: int) -> None:
        check_num_pixels(size[1], size[0])
        super().__init__(file, size)
        self.channels = channels

    def read(self, box: PixelBox, form: Form, rules: PixelRules) -> NDArray[Any]:
        def load() -> NDArray[Any]:
            pixels = decode(
                read_picture_file(self.file.path), Form.of_own_size(self.channels), rules
            )
            if pixels.shape[1:] != self.size:  # as of a PNG that says at its end how it is turned
                height, width = pixels.shape[1:]
                raise UnreadableImage(
                    f"{width} x {height} pixels, where its header says {self.size[1]} x {self.size[0]}"
                )
            return pixels

        key = (self.file, self.channels, rules.depth, str(rules.value_range), rules.alpha)
        whole = held_pieces.get(key, load)
        part = whole[:, *box.slices].transpose(1, 2, 0)
        return fit_pixels(part, form.size, form.fit).transpose(2, 0, 1)


def read_picture_file(path: Path) -> bytes:
    """The content of a file. Raises UnreadableImage."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error


@dataclass(frozen=True)
class Samples:
    """Which samples of a pixel of a TIFF are read, and as what."""

    use: int
    alpha: bool
    note: str
    missing: float | None
    is_multiplied: bool

    @classmethod
    def of(cls, layout: TiffLayout, channels: int) -> "Samples":
        """Those for data.channels. Raises UnreadableImage if they don't fit."""
        page = layout.page.keyframe
        use, alpha, note = choose_samples(layout, channels)
        check_channels(use - alpha, channels, note)
        is_multiplied = alpha and page.extrasamples[-1] == MULTIPLIED
        return cls(use, alpha, note, read_no_data(page), is_multiplied)

    def take(self, array: NDArray[Any]) -> Values:
        """Values (h, w, samples) of a part of the picture."""
        native = array[..., : self.use].astype(array.dtype.newbyteorder("="), copy=False)
        if self.is_multiplied:
            native = divide_by_alpha(native)
        return Values(native, self.alpha, self.note, self.missing)


class Segments:
    """The tiles or strips of one page of a TIFF.

    Holds what tifffile has read of the page's header, so the file is opened for the bytes of segments alone.
    """

    def __init__(self, file: FileId, number: int, page: Any) -> None:
        frame = page.keyframe
        self.file = file
        self.number = number
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        self.decode = frame.decode
        self.jpeg = (
            {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader}
            if frame.compression in JPEG_CODES
            else {}
        )
        self.dtype, self.nodata = frame.dtype, frame.nodata
        self.size = frame.imagelength, frame.imagewidth
        self.shape = (
            (frame.tilelength, frame.tilewidth)
            if frame.is_tiled
            else (min(frame.rowsperstrip, frame.imagelength), frame.imagewidth)
        )
        self.samples = frame.samplesperpixel
        self.is_planar = frame.planarconfig == 2 and self.samples > 1
        self.grid = (-(-self.size[0] // self.shape[0]), -(-self.size[1] // self.shape[1]))

    def read(self, box: PixelBox) -> NDArray[Any]:
        """The values (h, w, samples) of a box."""
        values = np.full((*box.size, self.samples), self.nodata, self.dtype)
        with open(self.file.path, "rb", buffering=0) as opened:
            for index, plane, top, left in self.find_segments(box):
                key = (self.file, self.number, index)
                segment = held_pieces.get(key, partial(self.load, opened.fileno(), index))
                paste(values[..., plane], segment, top - box.top, left - box.left)
        return values

    def find_segments(self, box: PixelBox) -> Iterator[tuple[int, slice, int, int]]:
        """The number, the samples, the top and the left of each segment that a box lies in."""
        height, width = self.shape
        rows = range(box.top // height, -(-box.bottom // height))
        columns = range(box.left // width, -(-box.right // width))
        planes = range(self.samples) if self.is_planar else [0]
        for plane, row, column in product(planes, rows, columns):
            index = (plane * self.grid[0] + row) * self.grid[1] + column
            samples = slice(plane, plane + 1) if self.is_planar else slice(None)
            yield index, samples, row * height, column * width

    def load(self, descriptor: int, index: int) -> NDArray[Any]:
        """The values (h, w, samples) of a segment; of one that the file leaves out, those of no data."""
        offset, count = self.offsets[index], self.counts[index]
        if not offset or not count:
            samples = 1 if self.is_planar else self.samples
            return np.full((*self.shape, samples), self.nodata, self.dtype)
        data = os.pread(descriptor, count, offset)
        if len(data) < count:
            raise UnreadableImage(
                f"truncated: segment {index} has {len(data):,} of {count:,} bytes"
            )
        try:
            segment = self.decode(data, index, **self.jpeg)[0]
        except Exception as error:  # a dozen codecs, each with exceptions of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UnreadableImage(f"segment {index}: {reason}") from error
        return np.asarray(segment[0])


def paste(values: NDArray[Any], segment: NDArray[Any], top: int, left: int) -> None:
    """Copy what of a segment (h, w, c) lies in `values`; its upper left pixel belongs at (top, left), which may be negative."""
    target = values[
        max(top, 0) : max(top + segment.shape[0], 0), max(left, 0) : max(left + segment.shape[1], 0)
    ]
    rows, columns = max(-top, 0), max(-left, 0)
    target[...] = segment[rows : rows + target.shape[0], columns : columns + target.shape[1]]


@lru_cache(OPEN_PICTURES)
def open_picture(file: FileId, channels: int) -> LargePicture:
    """The picture of a file for data.channels; only its header is read. Raises UnreadableImage."""
    if not file.stamp[0]:
        raise UnreadableImage("empty file")
    try:
        with file.path.open("rb") as opened:
            return open_by_kind(file, opened, channels)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    except UnreadableImage:
        raise
    except Exception as error:  # thirty decoders, each with exceptions of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableImage(reason) from error


def open_by_kind(file: FileId, opened: IO[bytes], channels: int) -> LargePicture:
    """The picture of an open file, by its first bytes."""
    start = opened.read(132)
    opened.seek(0)
    if is_dicom(start):
        dataset = read_dicom_header(opened)
        return WholePicture(file, (int(dataset.Rows), int(dataset.Columns)), channels)
    if start.startswith(NPY):
        header = read_header(opened)
        axes = choose_axes(header.shape, channels)
        check_length(header, file)
        return ArrayPicture(file, header, axes)
    if start.startswith(ZIP):
        with open_array(opened) as member:
            size = choose_axes(read_header(member).shape, channels).size
        return WholePicture(file, size, channels)
    if is_tiff(start):
        with open_tiff(opened) as tiff:
            return open_layout(file, lay_out(tiff, channels), channels)
    return WholePicture(file, measure_image(opened), channels)


def open_layout(file: FileId, layout: TiffLayout, channels: int) -> LargePicture:
    """The picture of an open TIFF: mapped, by segments, or whole if it is turned or of colours that need a conversion."""
    page = layout.page.keyframe
    mark = page.tags.get(ORIENTATION)
    orientation = int(mark.value) if mark else 1
    size = turn_form(Form(layout.size, 1), orientation).size
    if orientation != 1 or not has_plain_values(page):
        return WholePicture(file, size, channels)
    samples = Samples.of(layout, channels)
    if mapped := map_layout(file, layout):
        header, order = mapped
        check_length(header, file)
        return MappedTiff(file, size, samples, header, order)
    if layout.way == ROWS:
        return WholePicture(file, size, channels)
    if not has_codec(page):
        if is_pillows(layout):
            return WholePicture(file, size, channels)
        raise MissingCodec(describe_codec(page))
    return SegmentedTiff(file, layout, samples)


def has_plain_values(page: Any) -> bool:
    """Whether the values of a page are grey or RGB, or become so where they are decoded."""
    if page.photometric == YCBCR and page.compression in JPEG_CODES:
        return bool(page.dtype == np.uint8)
    is_plain = page.photometric in (BLACK_IS_ZERO, RGB) and not page.is_subsampled
    return bool(is_plain and page.bitspersample in (8, 16, 32, 64) and page.dtype.kind in "uif")


def has_codec(page: Any) -> bool:
    """Whether this installation can decode a page."""
    codecs, predictors = tifffile.TIFF.DECOMPRESSORS, tifffile.TIFF.UNPREDICTORS
    return page.compression in codecs and page.predictor in predictors


def map_layout(file: FileId, layout: TiffLayout) -> tuple[ArrayHeader, str] | None:
    """Where the values of a TIFF lie in its file, and the order of their axes (see MappedTiff); None if in several pieces."""
    page = layout.page.keyframe
    rows, columns = layout.size
    offset: int | None
    if layout.way == ROWS:
        order, shape = "RCS", (rows, columns, layout.samples)
        offset = layout.series.dataoffset
    elif layout.way == BANDS:
        order, shape = "SRC", (layout.samples, rows, columns)
        offset = layout.series.dataoffset if layout.series is not None else None
    else:
        is_planar = page.planarconfig == 2 and layout.samples > 1
        order, shape = "RCS", (rows, columns, layout.samples)
        if is_planar:
            order, shape = "SRC", (layout.samples, rows, columns)
        offset = page.dataoffsets[0] if layout.page is page and page.is_final else None
    if offset is None:
        return None
    dtype = np.dtype(page.parent.byteorder + page.dtype.char)
    return ArrayHeader(shape, dtype, False, offset), order


def check_length(header: ArrayHeader, file: FileId) -> None:
    """Raise UnreadableImage if a file is shorter than its header says: a memory map of it would end the process."""
    missing = header.offset + header.num_bytes - file.stamp[0]
    if missing > 0:
        raise UnreadableImage(f"truncated: {missing:,} of {header.num_bytes:,} bytes are missing")
