"""What a dataset holds, on one screen before training and on the card, with a warning where something is odd.

Sizes, bit depths and values come from the headers and pixels of a sample of the files; classes are counted over all images.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from codegrid.data.endings import REMEDIES
from codegrid.data.image_set import ImageSet
from codegrid.data.labels import display_classes
from codegrid.data.pixels import MAX_CHANNELS
from codegrid.data.ranges import FULL_16_BITS, format_ranges, write_ranges
from codegrid.data.samples import ArraySamples
from codegrid.data.source import spread
from codegrid.data.survey import SURVEYED_PIXELS, Survey
from codegrid.data.tiff import PLAIN_CHANNELS
from codegrid.data.tiles import TileSource
from codegrid.engine.sizes import write_size
from codegrid.engine.words import format_word

BLACK = 16  # of 255: what is darker everywhere is called black
NARROW = 64  # the part of a range that a channel takes up is called little below 1 by this
ENLARGED = 8  # times: one code of f=8 stands for a single pixel of such an image then
UNEVEN = 10  # classes are called uneven if one has this many times the images of another
SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>valid(?:ation)?|val|dev|eval)|(?P<test>test(?:ing)?))"
    r"[-_ ]?(?:set|data|split|images?|imgs?|[ab]|\d{4}|\d)?",
    re.IGNORECASE,
)


def summarize(data: ImageSet) -> dict[str, Any]:
    """The summary of a dataset, `summary`: what -> text, and what is odd about it, `odd`: sentences. Both may be empty."""
    counts = count_labels(data)
    rows = {
        "classes": describe_classes(data, counts),
        "labels": data.label_summary,
        "tiles": describe_tiles(data),
        "sizes": "" if tile_sources(data) else describe_sizes(data.survey),
        "pixels": summarize_values(data),
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


def count_labels(data: ImageSet) -> Counter[int] | None:
    """How many training images have each label; None if they are not known before the images are read."""
    samples = data.samples("train")
    labels: Any = data.source("train").labels
    if isinstance(samples, ArraySamples):
        labels = samples.labels if samples.rows is None else samples.labels[samples.rows]
    if labels is None:
        return None
    numbers, counts = np.unique(np.asarray(labels), return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def describe_classes(data: ImageSet, counts: Counter[int] | None) -> str:
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


def tile_sources(data: ImageSet) -> list[TileSource]:
    """The sources of both splits if their images are tiles of pictures; none otherwise."""
    sources = (data.source(split) for split in ("train", "val"))
    return [source for source in sources if isinstance(source, TileSource)]


def describe_tiles(data: ImageSet) -> str:
    """The pictures that tiles are cut out of, and how much of them is in none; empty for other data."""
    sources = tile_sources(data)
    if not sources:
        return ""
    sizes = sorted({(h, w) for source in sources for h, w in source.sizes.tolist()}, key=math.prod)
    texts = [f"{width:,} x {height:,}" for height, width in sizes]
    height, width = sources[0].tile
    pixels, outside = (
        sum(counts) for counts in zip(*(s.count_pixels() for s in sources), strict=True)
    )
    n = sum(len(source.sizes) for source in sources)
    text = (
        f"{sum(map(len, sources)):,} of {width} x {height} pixels out of {n:,} pictures of {texts[0]}"
        f"{f' to {texts[-1]}' if len(texts) > 1 else ''}"
    )
    whole = sum(int((~source.is_direct).sum()) for source in sources)
    if outside:
        text += f"; {outside / pixels:.1%} of the pixels, at right and lower borders, are in none"
    return f"{text}; {whole:,} pictures have to be decoded whole" if whole else text


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


def summarize_values(data: ImageSet) -> str:
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
        low, high = data.survey.values
        if len(rules.scaled_ranges) == 1:
            ((black, white),) = rules.scaled_ranges
            parts.append(
                f"values {low:,.6g} to {high:,.6g}, of which {black:,.6g} becomes black and {white:,.6g} white"
            )
        else:
            parts.append(
                f"values {low:,.6g} to {high:,.6g}, of which each channel shows {format_ranges(rules.scaled_ranges)}"
            )
        parts.append(f"pixels of {rules.depth} bits")
    if data.survey.masks:
        parts.append(
            "transparent pixels become white" if rules.alpha == "white" else "alpha is left out"
        )
    notes = Counter(facts.note for facts in data.survey.facts if facts.note)
    parts += [
        note if n == total else f"{note} ({n:,} of {total:,})" for note, n in notes.most_common(5)
    ]
    return "; ".join(parts)


def describe_left_out(data: ImageSet) -> str:
    """The files of the folder that are not read, by their endings."""
    most = sorted(data.left_out.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{n:,} {f'.{ending}' if ending else 'without an ending'}" for ending, n in most[:10]]
    return ", ".join(texts)


def odd_split(data: ImageSet) -> Iterator[str]:
    """A split that leaves most images to validation."""
    train, val = data.size("train"), data.size("val")
    if train < val:
        n_val = getattr(data, "n_val", None)
        advice = f"; data.n_val={max(1, (train + val) // 10)} holds out a tenth" if n_val else ""
        yield f"only {train:,} of {train + val:,} images train, and {val:,} validate{advice}"


def odd_folders(data: ImageSet) -> Iterator[str]:
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


def odd_classes(data: ImageSet, counts: Counter[int] | None) -> Iterator[str]:
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


def odd_files(data: ImageSet) -> Iterator[str]:
    """Images that are left out by their endings, further pages, and images smaller than what a model sees."""
    for ending, n in sorted(data.left_out.items()):
        if remedy := REMEDIES.get(ending):
            name = f".{ending} files" if ending else "files without an ending"
            yield f"{name} are left out, {n:,} of them; {remedy} if they are images of the dataset"
    facts = data.survey.facts
    if paged := [f for f in facts if f.has_pages]:
        first, n = paged[0], paged[0].num_pages
        advice = f"; data.channels={n} reads the {n} pages of {first.name} as channels"
        yield (
            f"{len(paged):,} of {len(facts):,} images are TIFFs of several pages, of which the first alone is read"
            f"{advice if 1 < n <= MAX_CHANNELS and n not in PLAIN_CHANNELS else ''}"
        )
    height, width = data.image_size
    small = sum(f.size[0] < width or f.size[1] < height for f in facts)
    if 2 * small > len(facts):
        yield f"{small:,} of {len(facts):,} images are smaller than data.image_size={write_size(data.image_size)} and are enlarged"
    enlarged = [(max(width / f.size[0], height / f.size[1]), f) for f in facts if min(f.size)]
    if tiny := [(times, f) for times, f in enlarged if times >= ENLARGED]:
        times, smallest = max(tiny, key=lambda pair: pair[0])
        yield (
            f"{smallest.name} of {smallest.size[0]} x {smallest.size[1]} pixels is enlarged {times:.0f} times to "
            f"data.image_size={write_size(data.image_size)}, and {len(tiny):,} of {len(facts):,} images {ENLARGED} times or more: "
            "take them out if they are no pictures"
        )


def odd_pixels(data: ImageSet) -> Iterator[str]:
    """Alpha that is none, bits that can't be read, and images that are nothing but black or of one colour."""
    rules, masks = data.rules, data.survey.masks
    if masks and rules.alpha == "ignore":
        yield (
            f"the fourth channel of {masks.count(False):,} of {len(masks):,} images is no mask, near infrared perhaps, "
            "and is left out; data.channels=4 reads it, and data.alpha=white blends it with white"
        )
    elif False in masks:
        yield (
            f"the alpha of {masks.count(False):,} of {len(masks):,} images is no mask; data.alpha=ignore leaves it out"
        )
    if cut := sum(f.is_cut for f in data.survey.facts):
        yield f"{cut:,} TIFFs of 16-bit colours are read with their upper 8 bits alone; save them as 16-bit PNG to use all"
    yield from odd_values(data)
    if data.is_stream:
        return
    images, _ = data.take_evenly("train", SURVEYED_PIXELS)
    if not len(images):
        return
    flat = images.flatten(1)
    blank = int((flat.amax(1) == flat.amin(1)).sum())
    brightest = int(flat.max()) * 255 // rules.top
    if brightest < BLACK:
        is_deep = any(facts.values for facts in data.survey.facts)
        hint = "; data.range=[0,<white>] sets their white" if is_deep else ""
        yield f"all of {len(images)} images looked at are black, at most {brightest} of 255{hint}"
    elif 4 * blank >= len(images):
        yield f"{blank} of {len(images)} images looked at are of one colour"


def odd_values(data: ImageSet) -> Iterator[str]:
    """Images of other depths or kinds of numbers than the rest, and values that are missing or have no effect."""
    rules, facts = data.rules, data.survey.facts
    deep = [f for f in facts if f.is_deep]
    plain = [f for f in facts if not f.is_deep]
    if not deep and rules.value_range not in (None, FULL_16_BITS):
        if facts:
            yield f"data.range={write_ranges(rules.scaled_ranges)} is for images of more than 8 bits, and none has more"
        return
    if deep and plain:
        tops = sorted({high for _, high in rules.scaled_ranges})
        yield (
            f"{len(plain):,} of {len(facts):,} images have 8 bits, as {plain[0].name}, and others more: 255 in them is as "
            f"bright as {' or '.join(f'{top:,.6g}' for top in tops[:4])} in the others"
        )
    yield from odd_channels(data)
    if len({f.number_type == "float32" for f in deep if f.number_type}) > 1:
        yield "some images hold floating-point values and others whole numbers, and one data.range serves all"
    if gaps := [f for f in deep if f.num_missing]:
        yield (
            f"{len(gaps):,} of {sum(f.number_type is not None for f in deep):,} images looked at have values that are no "
            f"numbers or mark missing data, as {gaps[0].name} {gaps[0].num_missing:,} of them, which are read as the lowest "
            f"value of data.range"
        )


def odd_channels(data: ImageSet) -> Iterator[str]:
    """Channels whose values take up little of a range that they share with others."""
    ranges = data.rules.scaled_ranges
    counts = {len(f.by_channel) for f in data.survey.facts if f.by_channel}
    if len(ranges) > 1 or len(counts) != 1 or (channels := counts.pop()) == 1:
        return
    ((low, high),) = ranges
    by_channel = enumerate(data.survey.by_channel(channels), 1)
    narrow = [(i, b - a) for i, (a, b) in by_channel if 0 < NARROW * (b - a) < high - low]
    if narrow:
        numbers = ", ".join(str(i) for i, _ in narrow[:10])
        subject, verb = ("channels", "take") if len(narrow) > 1 else ("channel", "takes")
        yield (
            f"{subject} {numbers} of {channels} {verb} up less than 1/{NARROW} of the range that all share, "
            f"{low:,.6g} to {high:,.6g}; data.range=percentiles gives each channel its own"
        )
