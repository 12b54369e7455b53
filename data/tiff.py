"""TIFF files of any number of bits and bands -> values, wherever Pillow would lose some.

Bands lie on disk in four ways: one page with the samples of a pixel side by side, one page with a plane for each band, a page
for each band, and a page for each row of pixels, whose width is the number of bands (tifffile writes arrays (h, w, c) so).
"""

import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from codegrid.data.orientation import ORIENTATION, apply_orientation
from codegrid.data.plain_tiff import BROKEN, Tag, open_plain, open_plain_series, peek_tags
from codegrid.data.values import UnreadableImage, Values, check_channels, check_num_pixels

MOST_BANDS = 16
MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF's
UNSIGNED = 1
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE = range(4)  # photometric interpretations
MULTIPLIED, PLAIN_ALPHA = 1, 2  # extra samples that are alpha, with colours multiplied by it or not
ALPHA_MARKS = (MULTIPLIED, PLAIN_ALPHA)
REDUCED, MASK = 1, 4  # kinds of pages that are no images of their own
UNNAMED = ("Q", "I")  # axes of pages of which a file does not say what they are
ROWS, BANDS = "one page a row", "one page a band"
ALPHA_IS_DATA = "the channel marked alpha is data"
PLAIN_CHANNELS = (1, 3)  # channels that a dataset of plain pictures has

# Odd tags are no reason to write on the screen for each file; what can't be read raises.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class MissingCodec(UnreadableImage):
    """The values are compressed in a way that needs a package which is not installed."""


@dataclass(frozen=True)
class TiffLayout:
    """Where the values of a picture lie in an open file.

    size       (rows, columns)
    samples    values of a pixel
    pages      the pages that hold them, in order; those of a series are read when they are asked for
    series     the series of these pages if they are all of it, so that it can be read in one go; else None
    way        ROWS or BANDS; empty if one page holds the picture
    others     further pages, which are not read
    """

    size: tuple[int, int]
    samples: int
    pages: Sequence[Any]
    series: Any = None
    way: str = ""
    others: int = 0

    @property
    def page(self) -> Any:
        """The page whose tags hold for all."""
        return self.pages[0]


def is_tiff(content: bytes) -> bool:
    """Whether a file begins as a TIFF."""
    return content.startswith(MAGICS)


def exceeds_pillow(content: bytes) -> bool:
    """Whether Pillow might lose bits or bands of a TIFF, by the tags of its first page; False for a broken file."""
    try:
        tags, following = peek_tags(content)
    except BROKEN:
        return False
    deep = max(tags.get(Tag.BITS, ()), default=1) > 8 or not {*tags.get(Tag.SAMPLE_FORMAT, ())} <= {
        UNSIGNED
    }
    samples = max(tags.get(Tag.SAMPLES, ()), default=1)
    return (
        deep or samples > 4 or bool(following and samples == 1)
    )  # pages that may be bands or rows


def open_tiff(file: IO[bytes]) -> Any:
    """The pages of a TIFF that is open for reading, as a context manager. Raises UnreadableImage for other files."""
    try:
        return tifffile.TiffFile(file)
    except tifffile.TiffFileError as error:
        raise UnreadableImage("no TIFF that can be read") from error


def read_tiff(content: bytes, channels: int) -> Values | None:
    """The values of a TIFF for data.channels, upright; None if Pillow reads as much of it.

    Several pages of one channel each are bands if `channels` is not 1, and of 3 if they are three; of others the first is read.
    A channel that the file marks as alpha is data if `channels` counts it. Raises UnreadableImage.
    """
    if page := open_plain(content):
        return read_unless_pillows(lay_out_page(page, 0), channels)
    if series := open_plain_series(content):
        return read_unless_pillows(lay_out_pages(series, channels), channels)
    with open_tiff(io.BytesIO(content)) as file:
        return read_unless_pillows(lay_out(file, channels), channels)


def read_unless_pillows(layout: TiffLayout, channels: int) -> Values | None:
    """The values of a picture whose place is known, upright; None if Pillow reads as much of it."""
    return (
        None if channels in PLAIN_CHANNELS and is_pillows(layout) else read_layout(layout, channels)
    )


def is_pillows(layout: TiffLayout) -> bool:
    """Whether Pillow reads all of a picture: plain colours of 8 bits, or colours that it converts to RGB."""
    page = layout.page.keyframe
    plain = page.dtype == np.uint8 and layout.samples <= 4 and not layout.way
    return plain or page.bitspersample < 8 or page.photometric > PALETTE


def read_layout(layout: TiffLayout, channels: int) -> Values:
    """The values of a picture whose place is known, upright. Raises UnreadableImage if `channels` does not fit."""
    page = layout.page.keyframe
    check_num_pixels(layout.size[1], layout.size[0])
    use, alpha, note = choose_samples(layout, channels)
    check_channels(use - alpha, channels, note)
    if page.dtype is None or page.dtype.kind not in "uif" or page.bitspersample < 8:
        raise UnreadableImage(f"{page.bitspersample}-bit {page.dtype or 'unknown'} values")
    check_complete(page)
    array = read_samples(layout)[..., :use]
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if alpha and page.extrasamples[-1] == MULTIPLIED:
        array = divide_by_alpha(array)
    return Values(array, alpha, note, read_no_data(page))


def lay_out(file: Any, channels: int) -> TiffLayout:
    """Where the picture for data.channels lies in an open TIFF. Raises UnreadableImage if there are two readings."""
    first = file.pages.first
    is_packed = first.is_imagej or '"truncated": true' in first.description
    if not file.pages.is_multipage and not is_packed:
        return lay_out_page(first, 0)
    series = file.series[0]
    if len(series.get_shape(True)) > 2 and series.keyframe.samplesperpixel == 1:
        return lay_out_pages(series, channels)
    own = [part for part in file.series if not part.keyframe.subfiletype & (REDUCED | MASK)]
    return lay_out_page(series[0], max(len(series), len(own)) - 1)


def lay_out_page(page: Any, others: int) -> TiffLayout:
    """The layout of a picture on one page, beside others."""
    keyframe = page.keyframe
    if keyframe.imagedepth > 1:
        raise UnreadableImage(f"a volume of {keyframe.imagedepth} slices")
    samples = 3 if keyframe.photometric == PALETTE else keyframe.samplesperpixel
    return TiffLayout((keyframe.imagelength, keyframe.imagewidth), samples, (page,), others=others)


def lay_out_pages(series: Any, channels: int) -> TiffLayout:
    """The layout of a series of pages of one sample each, which are bands, rows or pictures of their own."""
    page, n = series.keyframe, math.prod(series.get_shape(True)[:-2])
    size, width = (page.imagelength, page.imagewidth), page.imagewidth
    is_flat = len(series.get_shape(True)) == 3
    # A picture has more rows and columns than bands, a stack of small pages perhaps not.
    can_be_rows = series.kind == "shaped" and min(n, size[0]) > width
    rows = is_flat and width <= MOST_BANDS and (can_be_rows or width == channels)
    bands = pick_bands(series, channels)
    if rows and width == channels == len(bands):
        raise UnreadableImage(
            f"{n} pages of {width} x {size[0]} pixels, which are {channels} bands or as many rows of {channels} bands; "
            "save it with one page"
        )
    if rows and len(bands) != channels:
        return TiffLayout((n, size[0]), width, series, series, ROWS)
    if bands:
        if len(bands) == n:
            return TiffLayout(size, n, series, series, BANDS)
        return TiffLayout(size, len(bands), [series[number] for number in bands], way=BANDS)
    return lay_out_page(series[0], n - 1)


def pick_bands(series: Any, channels: int) -> list[int]:
    """The numbers of the pages of a series that are the bands of its first picture; none if they aren't bands.

    Three pages are bands of three channels unless the file says that they are something else, such as slices.
    """
    shape, axes = series.get_shape(True)[:-2], series.get_axes(True)[:-2]
    if channels == 1:
        return []
    if "C" in axes:
        axis = axes.index("C")
        step = math.prod(shape[axis + 1 :])
        return list(range(0, shape[axis] * step, step)) if shape[axis] == 3 or channels != 3 else []
    if len(shape) != 1 or (channels == 3 and not (shape[0] == 3 and axes in UNNAMED)):
        return []
    return list(range(shape[0]))


def choose_samples(layout: TiffLayout, channels: int) -> tuple[int, bool, str]:
    """How many samples of a pixel are read for data.channels, whether the last is alpha, and a note where there was a choice."""
    page, samples = layout.page.keyframe, layout.samples
    if samples == 1 and page.photometric == WHITE_IS_ZERO:
        return 1, False, "0 is white in the files, and the lowest value here"
    marks = [int(mark) for mark in page.extrasamples]
    if samples == channels:
        is_marked = bool(set(marks) & set(ALPHA_MARKS))
        return samples, False, ALPHA_IS_DATA if is_marked else layout.way
    if (
        channels in PLAIN_CHANNELS
        and samples - 1 in PLAIN_CHANNELS
        and not layout.way
        and page.dtype.kind == "u"
    ):
        if marks[-1:] and marks[-1] in ALPHA_MARKS:
            return samples, True, ""
        if page.photometric == RGB:
            return samples - 1, False, "a fourth channel without a name is left out"
    return samples, False, layout.way


def check_complete(page: Any) -> None:
    """Raise UnreadableImage for a page that lacks some of its strips or tiles, in whose place tifffile would put zeros."""
    expected = math.prod(page.chunked)
    if len(page.dataoffsets) < expected:
        raise UnreadableImage(f"{len(page.dataoffsets)} of {expected:,} pieces, truncated")


def read_samples(layout: TiffLayout) -> NDArray[Any]:
    """The values (h, w, samples) of a picture, upright."""
    page = layout.page.keyframe
    try:
        if layout.series is not None:
            array = layout.series.asarray(maxworkers=1)
        elif layout.way == BANDS:
            array = np.stack([part.asarray(maxworkers=1) for part in layout.pages])
        else:
            array = layout.page.asarray(maxworkers=1)
    except (ValueError, NotImplementedError, ModuleNotFoundError) as error:
        # tifffile looks for zstd in the standard library of Python 3.14 where imagecodecs is missing.
        if "imagecodecs" in str(error) or isinstance(error, ModuleNotFoundError):
            raise MissingCodec(describe_codec(page)) from error
        raise
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if page.photometric == PALETTE:
        array = page.colormap[:, array]
    if layout.way == ROWS:
        return array
    if array.ndim == 2:
        planes = array[None]
    else:
        is_planar = layout.way == BANDS or page.photometric == PALETTE or page.axes == "SYX"
        planes = array if is_planar else array.transpose(2, 0, 1)
    orientation = page.tags.get(ORIENTATION)
    turned = apply_orientation(planes, int(orientation.value) if orientation else 1)
    return turned.transpose(1, 2, 0)


def read_no_data(page: Any) -> float | None:
    """The value by which a page marks pixels without data, as GDAL writes it; None without one, and for what is no finite number.

    tifffile's own `nodata` is 0 where the text does not fit the type of the values, and 0 is a value.
    """
    mark = page.tags.get(Tag.NO_DATA)
    try:
        value = math.nan if mark is None else float(str(mark.value).strip("\0 ").replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def divide_by_alpha(values: NDArray[Any]) -> NDArray[Any]:
    """Colours (h, w, c + 1) that are multiplied by the last channel, alpha, as they were before that."""
    largest = np.iinfo(values.dtype).max
    alpha = values[..., -1:]
    colours = values[..., :-1] * (largest / np.maximum(alpha, 1))
    divided = np.rint(colours.clip(0, largest)).astype(values.dtype)
    return np.concatenate([np.where(alpha > 0, divided, 0), alpha], 2)


def describe_codec(page: Any) -> str:
    """How a page is packed, and what unpacks it."""
    compression = getattr(page.compression, "name", str(page.compression))
    if page.bitspersample % 8:
        compression = f"{page.bitspersample}-bit"
    predicted = " with a predictor" if page.predictor > 1 else ""
    return f"{compression} compression{predicted}, which needs pip install imagecodecs"
