"""Which images a run was trained on, wherever they lie: what a run records of them, and today's images compared to that.

The record does not depend on the folder that the images lie in, nor on times: a copy on another machine has the same hash.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from codegrid.data.image_set import ImageSet
from codegrid.data.source import Source
from codegrid.data.store import fingerprint
from codegrid.engine.console import best_effort_write, log_line
from codegrid.engine.errors import InputError
from codegrid.engine.folder import IMAGES, read_record
from codegrid.engine.sizes import to_setting

SAMPLED = 32  # images of a split whose content is hashed; the names and sizes of all are
SCATTER = np.uint64(
    0x9E3779B97F4A7C15
)  # odd: multiplied by it, modulo 2^64, ids that are near each other lie apart
MAX_LISTED = 5_000_000  # images of a split that a run folder lists, at 16 bytes each
SHOWN_NAMES = 3  # names in a sentence

Ids = NDArray[np.uint64]
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageList:
    """The images of a split: an id and a size in bytes for each, and the ids and the digests of some of them.

    An id is a hash of the image's name, or its number where images have no names; a size is 0 where it is not known. There are
    labels, hashes of the names of classes, where a table has them.
    """

    ids: Ids
    sizes: NDArray[np.int64]
    sampled: Ids
    digests: Ids
    labels: Ids

    @classmethod
    def of(cls, source: Source) -> "ImageList":
        """The images of a source. A function of the id decides which are sampled, so that a few new files change few of them."""
        ids = source.image_ids()
        rows = np.argsort(ids * SCATTER, kind="stable")[:SAMPLED]
        sizes, labels = source.image_sizes(), source.label_ids()
        return cls(ids, sizes, ids[rows], digest_images(source, rows), labels)

    def hash(self, kind: Any) -> str:
        """A hash of the list, in its order, and of `kind`, what else decides on the images, such as their labels."""
        content = hashlib.sha256(fingerprint(kind).encode())
        for array in (self.ids, self.sizes, self.sampled, self.digests):
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()[:12]


def digest_images(source: Source, rows: Sequence[int] | NDArray[np.int64]) -> Ids:
    """A digest of the undecoded content of each of these images, 0 where a source has none to read."""
    contents = [source.raw_content(int(row)) for row in rows]
    digests = [0 if content is None else digest_content(content) for content in contents]
    return np.array(digests, np.uint64)


def digest_content(content: bytes) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def identify_images(images: ImageSet) -> dict[str, str]:
    """A hash of the images of each split, which tells whether other images are the same."""
    return {split: hash_images(images.source(split)) for split in SPLITS}


def hash_images(source: Source) -> str:
    """A hash of the images of a source. Of very many without names, as in a stream, their number stands for them."""
    if len(source) > MAX_LISTED and not source.has_names:
        return fingerprint([source.content_key, len(source)])
    return ImageList.of(source).hash(source.content_key)


def identify_pixels(images: ImageSet, split: str) -> str:
    """A hash of the images of a split as a model sees them, which is the same wherever they lie."""
    key = {name: value for name, value in images.cache_key(split).items() if name != "source"}
    return fingerprint([hash_images(images.source(split)), key, to_setting(images.image_size)])


def save_image_ids(images: ImageSet, folder: Path) -> None:
    """List the images of both splits in a run folder, so that a later command can say which were added and which are missing.

    Images that the run was trained on before it was resumed stay in the list.
    """
    arrays: dict[str, NDArray[Any]] = {}
    earlier = read_image_lists(folder)
    for split in SPLITS:
        source = images.source(split)
        if len(source) > MAX_LISTED:
            continue
        current = ImageList.of(source)
        if split == "train" and split in earlier:
            current = unite(current, earlier[split])
        arrays |= {f"{split}_{name}": array for name, array in vars(current).items()}
    part = folder / f".{IMAGES}.npz"
    with best_effort_write(folder / IMAGES):
        np.savez(part, **arrays)  # type: ignore[arg-type]
        os.replace(part, folder / IMAGES)


def unite(current: ImageList, earlier: ImageList) -> ImageList:
    """The images of two lists; those of both are as in the current one."""
    gone = ~np.isin(earlier.ids, current.ids)
    if not gone.any():
        return current
    unsampled = ~np.isin(earlier.sampled, current.ids)
    return ImageList(
        np.concatenate([current.ids, earlier.ids[gone]]),
        np.concatenate([current.sizes, earlier.sizes[gone]]),
        np.concatenate([current.sampled, earlier.sampled[unsampled]]),
        np.concatenate([current.digests, earlier.digests[unsampled]]),
        np.concatenate([current.labels, earlier.labels[gone]])
        if len(current.labels) and len(earlier.labels)
        else current.labels[:0],
    )


def read_image_lists(folder: Path) -> dict[str, ImageList]:
    """The lists in a run folder by their splits; none for a run of an earlier version, or of too many images.

    Damage is reported, and is no reason to end a run.
    """
    if not (folder / IMAGES).is_file():
        return {}
    names = list(ImageList.__dataclass_fields__)
    try:
        with (folder / IMAGES).open("rb") as file, np.load(file) as arrays:
            return {
                split: ImageList(*(read_list(arrays, f"{split}_{name}") for name in names))
                for split in SPLITS
                if f"{split}_ids" in arrays
            }
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        log_line(f"{folder / IMAGES} is damaged ({error}), so it can't be said which images differ")
        return {}


def read_list(arrays: Mapping[str, Any], name: str) -> NDArray[Any]:
    """An array of a run folder's list; none of labels in one that an earlier version wrote."""
    if name.endswith("_labels") and name not in arrays:
        return np.zeros(0, np.uint64)
    array: NDArray[Any] = arrays[name]
    return array


@dataclass(frozen=True)
class SplitChange:
    """How the images of a split differ from those that a run recorded. All but the first three are 0 if it did not list them.

    now, before  numbers of images
    added        images that the run did not have, `examples` of which are names
    swapped      images of the run's other split
    copied       validation images whose copies the run was trained on, and which are left out of training now
    missing      images of the run that are in neither split
    altered      images of the same name and another size or content
    relabelled   images of the same name and another label in the table
    """

    split: str
    now: int
    before: int
    added: int = 0
    swapped: int = 0
    copied: int = 0
    missing: int = 0
    altered: int = 0
    relabelled: int = 0
    examples: Sequence[str] = ()

    @property
    def leaked(self) -> bool:
        """Whether the run was trained on images that validate now, as after it was resumed on another split."""
        return self.split == "val" and self.swapped + self.copied > 0

    def __str__(self) -> str:
        """Such as "train has 54 instead of 52 images (2 added, as cats/new.png)"."""
        instead = "" if self.now == self.before else f" instead of {self.before:,}"
        swapped = (
            "validated before"
            if self.split == "train"
            else ("trained before, so that their scores are too good")
        )
        counts = {
            f"added, as {', '.join(self.examples)}": self.added,
            "missing": self.missing,
            "of the same name with another content": self.altered,
            "with another label": self.relabelled,
            swapped: self.swapped,
            "copies of images that trained before, so that their scores are too good": self.copied,
        }
        details = [f"{n:,} {what}" for what, n in counts.items() if n]
        if not instead and not details:
            details = ["with other contents or labels, or in another order"]
        return f"{self.split} has {self.now:,}{instead} images" + (
            f" ({'; '.join(details)})" if details else ""
        )


@dataclass(frozen=True)
class ImageChange:
    """How the images of a run's splits differ from those that it recorded.

    `unchanged` is the fraction of the run's training images that are there as they were; None if the run did not list them.
    `may_leak` is whether training images may validate now, because an earlier version split by numbers and listed nothing.
    """

    splits: Sequence[SplitChange]
    unchanged: float | None
    may_leak: bool = False

    def __str__(self) -> str:
        text = ", ".join(map(str, self.splits))
        if not self.may_leak:
            return text
        return (
            f"{text}; images that it was trained on may validate now, because its version split images by their numbers, so take "
            "out what was added and restore what is missing"
        )


def compare_images(images: ImageSet, folder: Path) -> ImageChange | None:
    """How the images differ from those that the run in `folder` recorded; None if they are the same, or it recorded none.

    Runs of earlier versions recorded a hash of names, sizes, times and the folder: if it is not equal, the numbers of
    images decide.
    """
    recorded = read_record(folder, "data")
    if not recorded or not {"hash", *SPLITS} <= recorded.keys():
        return None
    sources = {split: images.source(split) for split in SPLITS}
    lists = read_image_lists(folder)
    if "images" in recorded:
        current = identify_images(images)
        differing = {split for split in SPLITS if current[split] != recorded["images"][split]}
    else:
        keys = [images.cache_key(split) for split in SPLITS]
        # With on_error=skip the record counts the readable ones.
        unlike = {
            split
            for split in SPLITS
            if len(sources[split]) != recorded[split] and images.on_error == "stop"
        }
        differing = set() if fingerprint(keys) == recorded["hash"] else unlike
    if set(lists) != set(SPLITS):
        changes = [SplitChange(s, len(sources[s]), recorded[s]) for s in SPLITS if s in differing]
        return ImageChange(changes, None, images.splits_by_number) if changes else None
    share_names = sources["train"].shares_names(sources["val"])
    copied = int(np.isin(images.copied_ids, lists["train"].ids).sum())
    compared = [compare_split(split, sources, lists, share_names, copied) for split in SPLITS]
    changes = [change for change in compared if change.split in differing or change.leaked]
    train = sources["train"]
    altered = find_altered(train, lists["train"])
    same = np.setdiff1d(np.intersect1d(lists["train"].ids, train.image_ids()), altered)
    return ImageChange(changes, len(same) / max(1, len(lists["train"].ids))) if changes else None


def compare_split(
    split: str,
    sources: Mapping[str, Source],
    lists: Mapping[str, ImageList],
    share_names: bool,
    copied: int,
) -> SplitChange:
    """How a split differs from the one in `lists`. The two splits may `share_names`: they are parts of one set of images.

    Of the validation images, `copied` are copies of images that the run was trained on.
    """
    source, earlier = sources[split], lists[split]
    [other] = set(SPLITS) - {split}
    ids = source.image_ids()
    new = ~np.isin(ids, earlier.ids)
    gone = ~np.isin(earlier.ids, ids)
    swapped = np.isin(ids, lists[other].ids) & share_names
    if split == "train":  # which lists all that the run was ever trained on
        swapped &= new
    if share_names:
        gone &= ~np.isin(earlier.ids, sources[other].image_ids())
    added = np.flatnonzero(new & ~swapped)
    return SplitChange(
        split,
        len(source),
        len(earlier.ids),
        added=len(added),
        swapped=int(swapped.sum()),
        copied=copied if split == "val" else 0,
        missing=int(gone.sum()),
        altered=len(find_altered(source, earlier)),
        relabelled=count_relabelled(source, earlier),
        examples=[source.image_name(int(row)) for row in added[:SHOWN_NAMES]],
    )


def find_altered(source: Source, earlier: ImageList) -> Ids:
    """The ids of images that have another size than in an earlier list or, among those sampled, another content."""
    ids = source.image_ids()
    common, here, there = np.intersect1d(ids, earlier.ids, return_indices=True)
    resized = common[source.image_sizes()[here] != earlier.sizes[there]]
    sampled, rows, places = np.intersect1d(ids, earlier.sampled, return_indices=True)
    rewritten = sampled[digest_images(source, rows) != earlier.digests[places]]
    return np.union1d(resized, rewritten)


def count_relabelled(source: Source, earlier: ImageList) -> int:
    """The number of images that have another label than in an earlier list, where tables have labels."""
    labels = source.label_ids()
    if not len(labels) or not len(earlier.labels):
        return 0
    _, here, there = np.intersect1d(source.image_ids(), earlier.ids, return_indices=True)
    return int((labels[here] != earlier.labels[there]).sum())


def check_same_images(images: ImageSet, folder: Path | None, resumes: bool = False) -> None:
    """Print how the images differ from those that the run in `folder` was trained on; nothing if they don't.

    A run that `resumes` there continues if most of its training images are the same ones, for a folder may have grown.
    Raises InputError if they are others: a run is what it was trained on.
    """
    change = compare_images(images, folder) if folder else None
    if change is None:
        return
    sentence = f"the images are not those that {folder} was trained on: {change}"
    if resumes and change.unchanged is not None and change.unchanged < 0.5:
        raise InputError(
            f"{sentence}; say where its own images are, or use these for a run or sweep of another name"
        )
    log_line(sentence)
