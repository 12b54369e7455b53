"""What a dataset holds, on one screen before training and on the card, with a warning where something is odd.

Sizes, bit depths and values come from the headers and pixels of a sample of the files; classes are counted over all images.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.decode import (
    has_alpha_channel,
    has_deep_colours,
    open_image,
    read_deep_colours,
    read_grey_values,
)
from data.endings import REMEDIES
from data.labels import display_classes
from data.pixels import PixelRules, Range, choose_range, find_extremes, mask_numbers
from data.samples import ArraySamples
from data.source import RawImage, Source, spread
from data.threads import map_in_threads
from engine.words import format_word

if TYPE_CHECKING:
    from data.datamodule import ImageDataModule

SURVEYED = 256  # images of a split whose headers are read
SURVEYED_PIXELS = (
    64  # of them, those whose pixels are read, where their values or their alpha matter
)
BLACK = 16  # of 255: what is darker everywhere is called black
DOUBTFUL_ALPHA = 0.5  # a mask has fewer pixels that are neither 0 nor 255
FEW_LEVELS = 16  # a mask with more levels of alpha than these is smooth
UNEVEN = 10  # classes are called uneven if one has this many times the images of another
READ_AT_ONCE = 8  # files

MODES = {
    "1": "1-bit", "L": "8-bit grey", "P": "8-bit palette", "RGB": "8-bit RGB", "RGBA": "8-bit RGB with alpha",
    "LA": "8-bit grey with alpha", "CMYK": "8-bit CMYK", "I": "32-bit grey", "F": "floating-point grey",
}  # fmt: skip

# Names of folders that hold one split of a dataset, as training_set or testA.
SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>valid(?:ation)?|val|dev|eval)|(?P<test>test(?:ing)?))"
    r"[-_ ]?(?:set|data|split|images?|imgs?|[ab]|\d{4}|\d)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ImageFacts:
    """What an image file says about itself.

    values      lowest and highest value if it has more than 8 bits; None if it has not, or was not looked at
    is_mask     whether its alpha channel can be one: mostly 0 or 255, or a few levels; None without one
    has_pages   whether a TIFF has further pages
    is_cut      whether only the upper 8 of its 16 bits can be read
    """

    size: tuple[int, int]
    kind: str
    values: Range | None = None
    is_mask: bool | None = None
    has_pages: bool = False
    is_cut: bool = False

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

    @property
    def masks(self) -> list[bool]:
        """Of each image with an alpha channel whether that can be a mask."""
        return [facts.is_mask for facts in self.facts if facts.is_mask is not None]


def survey_sources(sources: Sequence[Source], patience: float | None = None) -> Survey:
    """Look at a sample of the images, spread evenly over each source. Images that can't be read are left to training.

    Raises InputError if one takes longer than `patience` seconds.
    """
    survey = Survey()
    for source in sources:
        survey.total += len(source)
        rows = source.pick_rows(SURVEYED)
        headers = inspect_rows(source, False, rows, patience)
        deep = [row for row, facts in headers.items() if facts.needs_pixels]
        chosen = [deep[i] for i in spread(len(deep), SURVEYED_PIXELS)]
        survey.facts += (headers | inspect_rows(source, True, chosen, patience)).values()
    return survey


def inspect_rows(
    source: Source, reads_pixels: bool, rows: Sequence[int], patience: float | None
) -> dict[int, ImageFacts]:
    """The facts of these images of a source, without those that have none."""
    num_threads = READ_AT_ONCE if source.use_threads else 1
    results = map_in_threads(partial(inspect, source, reads_pixels), rows, num_threads, patience)
    with closing(results):
        return {row: facts for row, facts in zip(rows, results, strict=True) if facts}


def inspect(source: Source, reads_pixels: bool, row: int) -> ImageFacts | None:
    """The facts of an image of a source; None if it has no file, or one that is no image."""
    try:
        raw = source.open_raw(row)
        return None if raw is None else inspect_raw(raw, reads_pixels)
    except Exception:  # the reader of all images reports what is wrong; there are thirty decoders
        return None


def inspect_raw(raw: RawImage, reads_pixels: bool) -> ImageFacts:
    """The facts of an open file, which is closed, or of an image in memory."""
    if isinstance(raw, np.ndarray):
        return inspect_array(raw)
    if isinstance(raw, Image.Image):
        return inspect_image(raw, b"", reads_pixels)
    with raw:
        content = raw.read() if reads_pixels else raw.read(32)
        raw.seek(0)
        with open_image(raw) as image:
            return inspect_image(image, content, reads_pixels)


def inspect_array(array: NDArray[Any]) -> ImageFacts:
    """The facts of an image that is an array (h, w), (h, w, c) or (c, h, w)."""
    height, width = array.shape[1:] if array.shape[0] in (1, 3, 4) else array.shape[:2]
    bits = "floating-point" if array.dtype.kind == "f" else f"{8 * array.itemsize}-bit"
    values = find_extremes(array) if array.dtype != np.uint8 else None
    return ImageFacts((width, height), f"{bits} array", values)


def inspect_image(image: Image.Image, content: bytes, reads_pixels: bool) -> ImageFacts:
    """The facts of an image; `content` is its file, at least the beginning of it."""
    size, mode = image.size, image.mode
    kind = "16-bit grey" if mode.startswith("I;16") else MODES.get(mode, mode)
    is_deep = has_deep_colours(image, content)
    if is_deep:
        kind = kind.replace("8-bit", "16-bit")
    values = is_mask = None
    has_pages = image.format == "TIFF" and has_second_frame(image)
    is_cut = False
    if reads_pixels:
        image.load()
        array = read_grey_values(image)
        if array is None and is_deep:
            array = read_deep_colours(content)
            is_cut = array is None
        if array is not None:
            colours = array if array.ndim == 2 else array[..., : (1 if array.shape[2] == 2 else 3)]
            values = find_extremes(colours) if mask_numbers(colours).any() else None
        if has_alpha_channel(image):
            is_mask = can_be_mask(np.asarray(image.convert("RGBA").getchannel("A")))
    return ImageFacts(size, kind, values, is_mask, has_pages, is_cut)


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


def choose_rules(
    survey: Survey, value_range: Range | None, alpha: str | None, is_open: bool
) -> PixelRules:
    """The rules for all images, by the sample of them, where the settings `value_range` and `alpha` are None.

    The range may be widened while the images are read if it `is_open`; it is not chosen yet if the sample has no image of
    more than 8 bits. Alpha is left out if most of the alpha channels can't be masks.
    """
    is_open = is_open and value_range is None
    if value_range is None and survey.values:
        value_range = choose_range(*survey.values)
    if alpha is None:
        alpha = "ignore" if 2 * sum(survey.masks) < len(survey.masks) else "white"
    return PixelRules(value_range, alpha, is_open)


def summarize(data: "ImageDataModule") -> dict[str, Any]:
    """The summary of a dataset, `summary`: what -> text, and what is odd about it, `odd`: sentences. Both may be empty."""
    counts = count_labels(data)
    rows = {
        "classes": describe_classes(data, counts),
        "sizes": describe_sizes(data.survey),
        "pixels": describe_pixels(data),
        "left out": describe_left_out(data),
    }
    odd = [
        *odd_split(data),
        *odd_folders(data),
        *odd_classes(data, counts),
        *odd_files(data),
        *odd_pixels(data),
    ]
    return {"summary": {name: text for name, text in rows.items() if text}, "odd": odd}


def count_labels(data: "ImageDataModule") -> Counter[int] | None:
    """How many training images have each label; None if they are not known before the images are read."""
    samples = data.samples("train")
    labels: Any = data.source("train").labels
    if isinstance(samples, ArraySamples):
        labels = samples.labels if samples.rows is None else samples.labels[samples.rows]
    if labels is None:
        return None
    numbers, counts = np.unique(np.asarray(labels), return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def describe_classes(data: "ImageDataModule", counts: Counter[int] | None) -> str:
    """The number of classes, with numbers, names and how many images they have; empty for data without classes."""
    names = data.classes
    occurring = sorted(label for label in counts or () if label >= 0)
    if len(names) < 2 and len(occurring) < 2:
        return ""
    if counts is None:
        return f"{len(names)}: {display_classes(names)}"
    by_name = dict(enumerate(names))
    listed = sorted({*by_name, *occurring})
    texts = [f"{label}={by_name.get(label, label)} ({counts[label]:,})" for label in listed[:20]]
    more = f" and {len(listed) - 20:,} more" if len(listed) > 20 else ""
    unlabelled = f"; {counts[-1]:,} images have none" if counts[-1] else ""
    return f"{len(listed):,}: {', '.join(texts)}{more}{unlabelled}"


def describe_sizes(survey: Survey) -> str:
    """The sizes of the images; of a sample of them, if they are many."""
    sizes = sorted({facts.size for facts in survey.facts}, key=lambda size: size[0] * size[1])
    if not sizes:
        return ""
    texts = [f"{width} x {height}" for width, height in sizes]
    return (
        texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]} pixels, {len(texts)} different"
    ) + describe_sample(survey)


def describe_sample(survey: Survey) -> str:
    """How many images were looked at, if these are not all."""
    n = len(survey.facts)
    return f" (in {n:,} of {survey.total:,} images)" if n < survey.total else ""


def describe_pixels(data: "ImageDataModule") -> str:
    """Bit depths and colours with their numbers of images, and how more than 8 bits and alpha are read."""
    kinds = Counter(facts.kind for facts in data.survey.facts)
    if not kinds:
        return ""
    total = len(data.survey.facts)
    parts = [
        ", ".join(
            kind if n == total else f"{kind} ({n:,} of {total:,})"
            for kind, n in kinds.most_common()
        )
    ]
    rules = data.rules
    if data.survey.values and rules.value_range:
        (low, high), (black, white) = data.survey.values, rules.value_range
        parts.append(
            f"values {low:,.6g} to {high:,.6g}, of which {black:,.6g} becomes black and {white:,.6g} white"
        )
    if data.survey.masks:
        parts.append(
            "transparent pixels become white" if rules.alpha == "white" else "alpha is left out"
        )
    return "; ".join(parts)


def describe_left_out(data: "ImageDataModule") -> str:
    """The files of the folder that are not read, by their endings."""
    most = sorted(data.left_out.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{n:,} {f'.{ending}' if ending else 'without an ending'}" for ending, n in most[:10]]
    return ", ".join(texts)


def odd_split(data: "ImageDataModule") -> Iterator[str]:
    """A split that leaves most images to validation."""
    train, val = data.size("train"), data.size("val")
    if train < val:
        n_val = getattr(data, "n_val", None)
        advice = f"; data.n_val={max(1, (train + val) // 10)} holds out a tenth" if n_val else ""
        yield f"only {train:,} of {train + val:,} images train, and {val:,} validate{advice}"


def odd_folders(data: "ImageDataModule") -> Iterator[str]:
    """Folders that are named as splits, and are taken for classes or lie inside of them."""
    source = data.source("train")
    names = {
        part
        for row in spread(len(source), 10_000)
        for part in PurePath(source.image_name(row)).parent.parts
    }
    kinds: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in sorted(names):
        if match := SPLIT_NAME.fullmatch(name):
            kinds[str(match.lastgroup)].append(name)
    train, others = kinds["train"], [*kinds["val"], *kinds["test"]]
    if not train or not others:
        return
    listed = ", ".join([*train, *others])
    if not {*train, *others} & set(data.classes):
        yield f"the folders {listed} inside of the classes look like splits, and are mixed here"
        return
    sentence = f"the folders {listed} look like splits, and are classes here, all in one set"
    root = getattr(data, "root", None)
    if root:
        settings = (("data.root", train[0]), ("data.val_root", others[0]))
        words = " ".join(format_word(key, Path(root) / name) for key, name in settings)
        sentence += f"; {words} uses two as splits"
    yield sentence


def odd_classes(data: "ImageDataModule", counts: Counter[int] | None) -> Iterator[str]:
    """Classes that are uneven or no classes, names that are other numbers, images without a class among others with one."""
    if data.label_remark:
        yield data.label_remark
    names = data.classes
    shifted = [name for number, name in enumerate(names) if re.fullmatch(r"\d+", name)]
    if len(names) > 1 and shifted == names and names != [str(i) for i in range(len(names))]:
        yield (
            f"the names of the classes are numbers, {names[0]} to {names[-1]}, and their own numbers are 0 to {len(names) - 1}: "
            f"label=0 is {names[0]}"
        )
    if "" in names and len(names) > 1 and counts:
        yield f"{counts[names.index('')]:,} images lie in no class folder and are a class by themselves"
    by_size = [(n, label) for label, n in (counts or {}).items() if label >= 0]
    if len(by_size) < 2:
        return
    (fewest, small), (most, large) = min(by_size), max(by_size)
    if most >= UNEVEN * fewest:
        shown = [names[label] if label < len(names) else str(label) for label in (small, large)]
        yield f"classes have from {fewest:,} images ({shown[0]}) to {most:,} ({shown[1]})"
    if most == 1 and len(by_size) > 10:
        yield "no two images have the same label: it is probably no class; data.label=null leaves it out"


def odd_files(data: "ImageDataModule") -> Iterator[str]:
    """Images that are left out by their endings, further pages, and images smaller than what a model sees."""
    for ending, n in sorted(data.left_out.items()):
        if remedy := REMEDIES.get(ending):
            name = f".{ending} files" if ending else "files without an ending"
            yield f"{name} are left out, {n:,} of them; {remedy} if they are images of the dataset"
    facts = data.survey.facts
    if paged := sum(f.has_pages for f in facts):
        yield f"{paged:,} of {len(facts):,} images are TIFFs of several pages, of which the first alone is read"
    small = sum(min(f.size) < data.image_size for f in facts)
    if 2 * small > len(facts):
        yield f"{small:,} of {len(facts):,} images are smaller than data.image_size={data.image_size} and are enlarged"


def odd_pixels(data: "ImageDataModule") -> Iterator[str]:
    """Alpha that is none, bits that can't be read, and images that are nothing but black or of one colour."""
    rules, masks = data.rules, data.survey.masks
    if masks and rules.alpha == "ignore":
        yield (
            f"the fourth channel of {masks.count(False):,} of {len(masks):,} images is no mask, near infrared perhaps, "
            "and is left out; data.alpha=white blends it with white"
        )
    elif False in masks:
        yield (
            f"the alpha of {masks.count(False):,} of {len(masks):,} images is no mask; data.alpha=ignore leaves it out"
        )
    if cut := sum(f.is_cut for f in data.survey.facts):
        yield f"{cut:,} TIFFs of 16-bit colours are read with their upper 8 bits alone; save them as 16-bit PNG to use all"
    deep = [f for f in data.survey.facts if f.values]
    if len({f.kind.startswith("floating") for f in deep}) > 1:
        yield "some images hold floating-point values and others whole numbers, and one data.value_range serves all"
    if data.is_stream:
        return
    images, _ = data.take_evenly("train", SURVEYED_PIXELS)
    if not len(images):
        return
    flat = images.flatten(1)
    blank = int((flat.amax(1) == flat.amin(1)).sum())
    brightest = int(flat.max())
    if brightest < BLACK:
        hint = "; data.value_range=[0,<white>] sets their white" if deep else ""
        yield f"all of {len(images)} images looked at are black, at most {brightest} of 255{hint}"
    elif 4 * blank >= len(images):
        yield f"{blank} of {len(images)} images looked at are of one colour"
