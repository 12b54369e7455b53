"""Which image of one dataset shows the same as an image of another: pairs by the names of files, or by numbers."""

import posixpath
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.matching import NONE, SEVERAL, below, clean_path, place_names
from codegrid.data.source import FileSource
from codegrid.data.split import Names
from codegrid.engine.errors import InputError

NAMED = 3  # images in a sentence

# A part of a path by which files are paired, the strictest first.
READINGS: dict[str, Callable[[str], str]] = {
    "paths": str,
    "paths without endings": lambda path: posixpath.splitext(path)[0],
    "names in any folder, without endings": lambda path: posixpath.splitext(
        path.rpartition("/")[2]
    )[0],
}


def pair_names(names: Sequence[str], others: Sequence[str]) -> NDArray[np.int64]:
    """The place among `others` of the partner of each name, NONE for one that has none, SEVERAL for one that has several.

    Names are paired by their paths, by paths without endings, or by their last parts without endings: in the first of these
    ways in which all have a partner, or else in the one in which the most have.
    """
    cleaned, cleaned_others = list(map(clean_path, names)), list(map(clean_path, others))
    best, most = np.full(len(names), NONE), (0, 0)
    for read in READINGS.values():
        places = place_names([read(other) for other in cleaned_others])
        rows = np.array([places.get(read(name), NONE) for name in cleaned], np.int64)
        score = int((rows >= 0).sum()), int((rows == SEVERAL).sum())
        if score > most:
            best, most = rows, score
        if (best >= 0).all():
            break
    return best


def pair_images(
    images: ImageDataModule, others: ImageDataModule, split: str, setting: str
) -> NDArray[np.int64]:
    """The place of the partner of each image of a split: among the readable images of `others`, those of the same split first
    and those of the other split after them.

    Images of files are paired by their names, others by their numbers. Raises InputError, which names the `setting` of the other
    images, if an image has no partner.
    """
    names = readable_names(images, split)
    same, rest = (readable_names(others, each) for each in (split, other_split(split)))
    if is_numbered(names) or is_numbered(same):
        check_same_numbers(images, others, setting)
    share_names = others.source("train").shares_names(others.source("val"))
    # All at once: the way in which names are read must not depend on what lies in the other split.
    candidates = [*same, *rest] if share_names else same
    rows = pair_names(list(map(str, names)), list(map(str, candidates)))
    for fault, what in ((NONE, "have no partner among"), (SEVERAL, "have several partners among")):
        if (wrong := np.flatnonzero(rows == fault)).size:
            named = ", ".join(str(names[row]) for row in wrong[:NAMED])
            more = f" and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
            raise InputError(
                f"{len(wrong):,} of {len(names):,} {split} images {what} those of {setting}: {named}{more}; the two are paired by "
                "the names of their files, so give each image one of the same name"
            )
    return rows


def pair_rows(
    images: ImageDataModule, others: Sequence[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """The names of the images to train on and then of those to validate, and the place of each among `others`; NONE or SEVERAL for
    an image that has no place there, or none of its own.

    Images of two folders are known by their paths below the folder that holds both, or else by those below their own.
    """
    train, val = images.source("train"), images.source("val")
    own = [str(name) for source in (train, val) for name in source.names()]
    if not (isinstance(train, FileSource) and isinstance(val, FileSource)):
        return own, refuse_shared(pair_names(own, others))
    roots = [source.root.resolve().as_posix() for source in (train, val)]
    common = posixpath.commonpath(roots)
    below_common = [below(clean_path(other), f"{common}/") or other for other in others]
    names = [
        posixpath.normpath(posixpath.join(posixpath.relpath(root, common), str(name)))
        for root, source in zip(roots, (train, val), strict=True)
        for name in source.names()
    ]
    rows = refuse_shared(pair_names(names, below_common))
    by_own = refuse_shared(pair_names(own, others))
    return names, by_own if (by_own >= 0).sum() > (rows >= 0).sum() else rows


def refuse_shared(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places, of which those that occur several times are SEVERAL."""
    _, inverse, counts = np.unique(places, return_inverse=True, return_counts=True)
    return np.where((places >= 0) & (counts[inverse] > 1), SEVERAL, places)


def other_split(split: str) -> str:
    """The other of the two splits."""
    return "val" if split == "train" else "train"


def readable_names(images: ImageDataModule, split: str) -> Names:
    """The names of the samples of a split, or their numbers where images have none; all, as long as no image was read."""
    names = images.source(split).names()
    rows = images.samples(split).rows if split in images.loaded_splits else None
    return names if rows is None else [names[row] for row in rows.tolist()]


def is_numbered(names: Names) -> bool:
    """Whether images have numbers instead of names."""
    return isinstance(names, range) or (len(names) > 0 and not isinstance(names[0], str))


def check_same_numbers(images: ImageDataModule, others: ImageDataModule, setting: str) -> None:
    """Raise InputError if the numbers of two datasets stand for other images."""
    first, second = (data.source("train") for data in (images, others))
    if (first.numbering or first.key) != (second.numbering or second.key):
        raise InputError(
            f"the images of {images.title} and those of {setting}, {others.title}, have no names by which they could be paired, "
            "and their numbers stand for other images; train both tokenizers with the same seed and n_train on data of one kind"
        )
