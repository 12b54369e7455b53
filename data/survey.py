"""What a sample of the files of a dataset shows about all of them: sizes, bit depths, values and alpha."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.arrays import (
    NPY,
    ZIP,
    choose_axes,
    open_array,
    read_array,
    read_header,
    to_plain_type,
)
from codegrid.data.decode import (
    count_channels,
    has_alpha_channel,
    has_deep_colours,
    open_image,
    read_deep_colours,
    read_grey_values,
)
from codegrid.data.dicom import (
    foresee_values,
    is_dicom,
    note_reading,
    read_dicom,
    read_dicom_header,
)
from codegrid.data.pixels import MAX_CHANNELS, NUMBER_TYPES, PixelRules
from codegrid.data.ranges import (
    AUTO,
    PERCENTILES,
    Range,
    Ranges,
    choose_range,
    to_plain_number,
    write_ranges,
)
from codegrid.data.scaling import find_extremes, mask_numbers
from codegrid.data.source import RawImage, Source, spread
from codegrid.data.threads import map_in_threads
from codegrid.data.tiff import (
    ALPHA_IS_DATA,
    PLAIN_CHANNELS,
    choose_samples,
    is_pillows,
    is_tiff,
    lay_out,
    open_tiff,
    read_layout,
)
from codegrid.data.values import Values, fits_channels
from codegrid.engine.errors import InputError

SURVEYED = 256  # images of a split whose headers are read
SURVEYED_PIXELS = (
    64  # of them, those whose pixels are read, where their values or their alpha matter
)
SAMPLED_PIXELS = 2**14  # of each of these, which percentiles are computed of
CUT = 0.1  # percent of the values that are below or above the range of data.range=percentiles
DOUBTFUL_ALPHA = 0.5  # a mask has fewer pixels that are neither 0 nor 255
FEW_LEVELS = 16  # a mask with more levels of alpha than these is smooth
READ_AT_ONCE = 8  # files
HEADER_BYTES = 132  # by which kinds of files are known

MODES = {
    "1": "1-bit", "L": "8-bit grey", "P": "8-bit palette", "RGB": "8-bit RGB", "RGBA": "8-bit RGB with alpha",
    "LA": "8-bit grey with alpha", "CMYK": "8-bit CMYK", "I": "32-bit grey", "F": "floating-point grey",
}  # fmt: skip

# How the kinds of images of more than 8 bits begin.
DEEP_KINDS = ("16-bit", "32-bit", "64-bit", "floating-point")


@dataclass(frozen=True)
class ImageFacts:
    """What an image file says about itself.

    values      lowest and highest value if it has more than 8 bits; None if it has not, or was not looked at
    is_mask     whether its alpha channel can be one: mostly 0 or 255, or a few levels; None without one
    has_pages   whether a TIFF has further pages
    is_cut      whether only the upper 8 of its 16 bits can be read
    number_type the type of its values, one of NUMBER_TYPES, if it has more than 8 bits and was looked at
    by_channel  lowest and highest value of each channel, where there are `values`
    sample      some of these values (n, channels), at most SAMPLED_PIXELS pixels
    num_missing how many of its values are no numbers, or mark pixels without data
    name        of the image in messages
    note        how it is read where there was a choice
    channels    of a pixel, without alpha that is no data; None if they fit data.channels in any case
    num_pages   of a TIFF of grey pages that could be channels; 1 if they are, or for other files
    """

    size: tuple[int, int]
    kind: str
    values: Range | None = None
    is_mask: bool | None = None
    has_pages: bool = False
    is_cut: bool = False
    number_type: str | None = None
    by_channel: Ranges = ()
    sample: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    num_missing: int = 0
    name: str = ""
    note: str = ""
    channels: int | None = None
    num_pages: int = 1

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits a channel."""
        return self.number_type is not None or self.kind.startswith(DEEP_KINDS)

    @property
    def needs_pixels(self) -> bool:
        """Whether its pixels tell more than its header."""
        return not self.kind.startswith(("8-bit", "1-bit")) or self.kind.endswith("alpha")


@dataclass
class Survey:
    """The facts of some of the images, of `total` in all."""

    facts: list[ImageFacts] = field(default_factory=list)
    total: int = 0

    @property
    def values(self) -> Range | None:
        """The lowest and the highest value of images of more than 8 bits; None if there are none."""
        ranges = [facts.values for facts in self.facts if facts.values]
        if not ranges:
            return None
        lows, highs = zip(*ranges, strict=True)
        return min(lows), max(highs)

    def by_channel(self, channels: int) -> list[Range]:
        """The lowest and the highest value of each channel of images that have so many; empty without such images."""
        counted = [f.by_channel for f in self.facts if len(f.by_channel) == channels]
        return [
            (min(low for low, _ in each), max(high for _, high in each))
            for each in zip(*counted, strict=True)
        ]

    @property
    def is_mostly_deep(self) -> bool:
        """Whether at least half of the images have more than 8 bits."""
        num_deep = sum(facts.is_deep for facts in self.facts)
        return num_deep > 0 and 2 * num_deep >= len(self.facts)

    @property
    def number_type(self) -> str | None:
        """The type that holds the values of all images; of those of more than 8 bits, if there are any.

        None if none was looked at.
        """
        types = {facts.number_type for facts in self.facts if facts.number_type}
        if types:
            return name_number_type(np.result_type(*types))
        return "uint8" if self.facts else None

    def percentiles(self) -> Ranges | None:
        """The values between which all but a thousandth at each end lie, for each channel; None without values.

        Images with fewer channels than others do not count.
        """
        samples = [facts.sample for facts in self.facts if facts.sample is not None]
        if not samples:
            return None
        channels = max(sample.shape[1] for sample in samples)
        whole = np.concatenate([sample for sample in samples if sample.shape[1] == channels])
        return tuple(map(cut_ends, whole.T))

    @property
    def masks(self) -> list[bool]:
        """Of each image with an alpha channel whether that can be a mask."""
        return [facts.is_mask for facts in self.facts if facts.is_mask is not None]


def survey_sources(
    sources: Sequence[Source], channels: int, patience: float | None = None
) -> Survey:
    """Look at a sample of the images, spread evenly over each source. Images that can't be read are left to training.

    `channels` is data.channels, by which files of several axes or pages are read. Raises InputError if an image takes longer
    than `patience` seconds.
    """
    survey = Survey()
    for source in sources:
        survey.total += len(source)
        rows = source.pick_rows(SURVEYED)
        headers = inspect_rows(source, channels, False, rows, patience)
        deep = [row for row, facts in headers.items() if facts.needs_pixels]
        chosen = [deep[i] for i in spread(len(deep), SURVEYED_PIXELS)]
        facts = headers | inspect_rows(source, channels, True, chosen, patience)
        survey.facts += [replace(each, name=source.image_name(row)) for row, each in facts.items()]
    return survey


def inspect_rows(
    source: Source,
    channels: int,
    reads_pixels: bool,
    rows: Sequence[int],
    patience: float | None,
) -> dict[int, ImageFacts]:
    """The facts of these images of a source, without those that have none."""
    num_threads = READ_AT_ONCE if source.use_threads else 1
    look = partial(inspect, source, channels, reads_pixels)
    results = map_in_threads(look, rows, num_threads, patience)
    with closing(results):
        return {row: facts for row, facts in zip(rows, results, strict=True) if facts}


def inspect(source: Source, channels: int, reads_pixels: bool, row: int) -> ImageFacts | None:
    """The facts of an image of a source; None if it has no file, or one that is no image."""
    try:
        raw = source.open_raw(row)
        return None if raw is None else inspect_raw(raw, channels, reads_pixels)
    except Exception:  # the reader of all images reports what is wrong; there are thirty decoders
        return None


def inspect_raw(raw: RawImage, channels: int, reads_pixels: bool) -> ImageFacts:
    """The facts of an open file, which is closed, or of an image in memory."""
    if isinstance(raw, np.ndarray):
        return inspect_array(raw)
    if isinstance(raw, Image.Image):
        return inspect_image(raw, b"", channels, reads_pixels)
    if isinstance(raw, Values):
        return inspect_values(raw)
    with raw:
        content = raw.read() if reads_pixels else raw.read(HEADER_BYTES)
        raw.seek(0)
        if is_dicom(content):
            return inspect_values(read_dicom(content)) if reads_pixels else inspect_dicom(raw)
        if content.startswith((NPY, *ZIP)):
            return (
                inspect_values(read_array(content, channels))
                if reads_pixels
                else inspect_array_file(raw, channels)
            )
        if is_tiff(content) and (facts := inspect_tiff(raw, channels, reads_pixels)):
            return facts
        raw.seek(0)
        with open_image(raw) as image:
            return inspect_image(image, content, channels, reads_pixels)


def inspect_values(values: Values) -> ImageFacts:
    """The facts of an image by its values."""
    height, width, samples = values.array.shape
    colours = samples - values.alpha
    is_mask = None
    if values.alpha:
        alpha = values.array[..., -1]
        is_mask = can_be_mask((alpha >> 8 * (alpha.itemsize - 1)).astype(np.uint8))
    return ImageFacts(
        (width, height),
        describe_kind(values.array.dtype, colours, values.alpha),
        is_mask=is_mask,
        note=values.note,
        channels=colours,
        **measure_values(values.array[..., :colours], values.missing),
    )


def describe_kind(dtype: np.dtype[Any], colours: int, alpha: bool = False) -> str:
    """What kind of image has values of this type: 16-bit grey, 8-bit RGB with alpha, floating-point of 5 channels."""
    bits = "floating-point" if dtype.kind == "f" else f"{8 * dtype.itemsize}-bit"
    bits = "signed 8-bit" if dtype == np.int8 else bits
    name = {1: "grey", 3: "RGB"}.get(colours, f"of {colours} channels")
    return f"{bits} {name}{' with alpha' if alpha else ''}"


def inspect_tiff(file: IO[bytes], channels: int, reads_pixels: bool) -> ImageFacts | None:
    """The facts of a TIFF; None if Pillow reads as much of it."""
    with open_tiff(file) as tiff:
        layout = lay_out(tiff, channels)
        page = layout.page.keyframe
        if channels in PLAIN_CHANNELS and is_pillows(layout):
            return None
        samples, alpha, note = choose_samples(layout, channels)
        facts = ImageFacts(
            layout.size[::-1],
            describe_kind(page.dtype, samples - alpha, alpha),
            note=note,
            channels=samples - alpha,
        )
        if reads_pixels:
            facts = inspect_values(read_layout(layout, channels))
        num_pages = 1 + layout.others if samples == 1 else 1
        return replace(facts, has_pages=layout.others > 0, num_pages=num_pages)


def inspect_dicom(file: IO[bytes]) -> ImageFacts:
    """The facts of a DICOM file by its header."""
    dataset = read_dicom_header(file)
    kind = describe_kind(*foresee_values(dataset))
    size = int(dataset.Columns), int(dataset.Rows)
    return ImageFacts(size, kind, note=note_reading(dataset))


def inspect_array_file(file: IO[bytes], channels: int) -> ImageFacts:
    """The facts of a .npy or .npz file by its header."""
    with open_array(file) as member:
        header = read_header(member)
    axes = choose_axes(header.shape, channels)
    height, width = axes.size
    empty = to_plain_type(np.zeros((), header.dtype))
    return ImageFacts((width, height), describe_kind(empty.dtype, axes.channels), note=axes.note)


def inspect_array(array: NDArray[Any]) -> ImageFacts:
    """The facts of an image that is an array (h, w), (h, w, c) or (c, h, w)."""
    height, width = array.shape[1:] if array.shape[0] in (1, 3, 4) else array.shape[:2]
    bits = "floating-point" if array.dtype.kind == "f" else f"{8 * array.itemsize}-bit"
    channels_last = np.moveaxis(array, 0, -1) if array.shape[0] in (1, 3, 4) else array
    return ImageFacts((width, height), f"{bits} array", **measure_values(channels_last))


def inspect_image(
    image: Image.Image, content: bytes, channels: int, reads_pixels: bool
) -> ImageFacts:
    """The facts of an image; `content` is its file, at least the beginning of it."""
    num_channels = count_channels(image, content, channels)
    has_alpha = has_alpha_channel(image)
    alpha_is_data = has_alpha and num_channels == channels
    size, mode = image.size, image.mode
    kind = "16-bit grey" if mode.startswith("I;16") else MODES.get(mode, mode)
    is_deep = has_deep_colours(image, content)
    if is_deep:
        kind = kind.replace("8-bit", "16-bit")
    is_mask = None
    has_pages = image.format == "TIFF" and has_second_frame(image)
    is_cut = False
    measured: dict[str, Any] = {}
    if reads_pixels:
        image.load()
        array = read_grey_values(image)
        if array is None and is_deep:
            array = read_deep_colours(content)
            is_cut = array is None
        if array is not None:
            if array.ndim == 3 and not alpha_is_data:
                array = array[..., : (1 if array.shape[2] == 2 else 3)]
            measured = measure_values(array)
        if has_alpha and not alpha_is_data:
            is_mask = can_be_mask(np.asarray(image.convert("RGBA").getchannel("A")))
    return ImageFacts(
        size,
        kind,
        is_mask=is_mask,
        has_pages=has_pages,
        is_cut=is_cut,
        note=ALPHA_IS_DATA if alpha_is_data else "",
        channels=num_channels,
        num_pages=getattr(image, "n_frames", 1) if has_pages and mode == "L" else 1,
        **measured,
    )


def has_second_frame(image: Image.Image) -> bool:
    """Whether a file has more than one image."""
    try:
        image.seek(1)
    except EOFError:
        return False
    image.seek(0)
    return True


def can_be_mask(alpha: NDArray[np.uint8]) -> bool:
    """Whether an alpha channel can say what is transparent: mostly 0 or 255, or of a few levels. Near infrared is neither."""
    between = (alpha > 0) & (alpha < 255)
    return bool(between.mean() < DOUBTFUL_ALPHA) or len(np.unique(alpha)) <= FEW_LEVELS


def check_range_serves(survey: Survey, ranges: Ranges) -> None:
    """Raise InputError if all values of all images that were looked at lie outside data.range, in one of the channels."""
    deep = [facts for facts in survey.facts if facts.values]
    for channel, (low, high) in enumerate(ranges):
        limits = [limits_of(facts, channel, len(ranges)) for facts in deep]
        if not limits or not all(lowest > high or highest < low for lowest, highest in limits):
            continue
        where = f"channel {channel + 1} of " if len(ranges) > 1 else ""
        others = f", nor any of {len(deep) - 1:,} others looked at" if len(deep) > 1 else ""
        raise InputError(
            f"data.range={write_ranges(((low, high),))} holds no value of {where}{deep[0].name}, which has {limits[0][0]:,.6g} to "
            f"{limits[0][1]:,.6g}{others}; use data.range=auto, or a range that holds them"
        )


def limits_of(facts: ImageFacts, channel: int, num_ranges: int) -> Range:
    """The lowest and the highest value of an image; of a channel, where there are several ranges."""
    assert facts.values is not None
    return facts.by_channel[channel] if len(facts.by_channel) == num_ranges > 1 else facts.values


def name_number_type(kind: np.dtype[Any]) -> str:
    """The nearest of NUMBER_TYPES: float32 for all floating-point types and for wide whole numbers."""
    if kind.kind == "b":
        return "uint8"
    return kind.name if kind.name in NUMBER_TYPES else "float32"


def measure_values(values: NDArray[Any], missing: float | None = None) -> dict[str, Any]:
    """What ImageFacts says about values of more than 8 bits (h, w) or (h, w, channels); nothing for others."""
    if values.dtype == np.uint8:
        return {}
    numbers = mask_numbers(values, missing)
    planes = np.moveaxis(values, 2, 0) if values.ndim == 3 else values[None]
    by_channel = tuple(find_extremes(plane, missing) for plane in planes)
    return {
        "values": find_extremes(values, missing) if numbers.any() else None,
        "by_channel": by_channel if numbers.any() else (),
        "number_type": name_number_type(values.dtype),
        "sample": sample_values(
            np.where(numbers, values, np.nan) if missing is not None else values
        ),
        "num_missing": int(numbers.size - numbers.sum()),
    }


def sample_values(values: NDArray[Any]) -> NDArray[Any]:
    """Evenly spread pixels (n, channels) of an image (h, w) or (h, w, channels)."""
    pixels = values.reshape(values.shape[0] * values.shape[1], -1)
    return pixels[spread(len(pixels), SAMPLED_PIXELS)]


def cut_ends(values: NDArray[Any]) -> Range:
    """The range of values (n,) without CUT percent at each end, of at least one step of whole numbers.

    Values that are no numbers do not count.
    """
    values = values[mask_numbers(values)]
    if not len(values):
        return 0, 1
    low, high = map(float, np.percentile(values, (CUT, 100 - CUT)))
    if values.dtype.kind in "iu":
        low, high = np.floor(low), np.ceil(high)
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")  # short in a config
    return to_plain_number(low), to_plain_number(high if high > low else low + 1)


def check_channels_serve(survey: Survey, channels: int) -> None:
    """Raise InputError if no image of the sample fits data.channels. A few that don't are unreadable, each by itself."""
    facts = [f for f in survey.facts if f.channels is not None]
    counts = {f.channels: f for f in reversed(facts) if f.channels is not None}
    if len(facts) < len(survey.facts) or any(fits_channels(n, channels) for n in counts):
        return
    notes = {n: f"{f.name}{f' ({f.note})' if f.note else ''}" for n, f in sorted(counts.items())}
    if len(counts) > 1:
        listed = ", ".join(f"{n} in {note}" for n, note in [*notes.items()][:10])
        raise InputError(
            f"data.channels={channels}, and images have other numbers of channels, {listed}; put those of one number into "
            "a folder of their own"
        )
    for number, note in notes.items():
        remedy = f"use data.channels={number}"
        if number > MAX_CHANNELS:
            remedy = f"save {MAX_CHANNELS} of them at most"
        raise InputError(
            f"data.channels={channels}, and all of {len(facts):,} images looked at have {number}, as {note}; {remedy}"
        )


def choose_auto_range(survey: Survey, values: Range, channels: int) -> Range | Ranges:
    """The range of data.range=auto for images of these `values`: one for all channels, or one for each.

    Channels of floating-point numbers may have different units, such as temperature and pressure. Those of whole numbers come
    from one sensor, and three are taken for colours.
    """
    by_channel = survey.by_channel(channels)
    if survey.number_type == "float32" and channels not in PLAIN_CHANNELS and by_channel:
        return tuple(choose_range(*extremes) for extremes in by_channel)
    return choose_range(*values)


def choose_rules(
    survey: Survey,
    chosen: PixelRules,
    channels: int,
    range_setting: Ranges | str,
    decides_alpha: bool,
    decides_depth: bool,
) -> PixelRules:
    """The rules `chosen` by settings, completed by a sample of the images for pixels of so many channels.

    The range is not chosen yet if the sample has no image of more than 8 bits. Alpha is left out if most of the alpha
    channels can't be masks.
    """
    value_range: Range | Ranges | None = chosen.value_range
    if range_setting == AUTO and survey.values:
        value_range = choose_auto_range(survey, survey.values, channels)
    if range_setting == PERCENTILES and (ranges := survey.percentiles()):
        lows, highs = zip(*ranges, strict=True)
        value_range = ranges if len(ranges) == channels else (min(lows), max(highs))
    depth, alpha = chosen.depth, chosen.alpha
    if decides_depth:
        depth = 16 if survey.is_mostly_deep else 8
    if decides_alpha:
        alpha = "ignore" if 2 * sum(survey.masks) < len(survey.masks) else "white"
    number_type = chosen.number_type or survey.number_type
    return PixelRules(value_range, alpha, False, depth, chosen.show, number_type)
