"""Where the images of a split come from, before they are cached."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.decode import PLAIN, UnreadableImage, decode
from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules
from codegrid.data.split import Names, check_held_out, check_num_held_out, hash_names
from codegrid.data.store import fingerprint
from codegrid.data.values import Values

ENDS = 2**16  # bytes at the beginning and at the end of a file that tell it from others

ImageBatch = tuple[NDArray[Any], NDArray[np.int64], dict[int, str]]  # see Source.read_batch
RawImage = IO[bytes] | Image.Image | NDArray[Any] | Values  # an open file, or an image in memory


class Source(ABC):
    """n labelled images, each read by its index.

    key                identifies the content, in types that JSON can write; everything computed from the images is computed
                       anew when it changes
    content_key        the part of the key that is the same wherever the images lie and whenever they were copied; what
                       image_ids, image_sizes and raw_content say is not repeated in it
    shard_sizes        the number of images in each file, in order, if jumping between files is slow; else None
    checked_up_front   all images are read once before training, so that unreadable ones are known before it begins
    has_names          images have names that stay when others come or go
    use_threads        several threads read at the same time; False if that is unsafe or slower
    labels             the label of each image, if they are known before the images are read; else None
    columns            further values of each image by their names, (n, ...): float32 numbers and vectors, not a number for none;
                       or int64, -1 for none, which the datamodule's `column_names` name
    label_key          identifies labels and columns that lie beside the images, in a table, and that the `key` therefore leaves
                       out: the images need not be decoded again when it changes; None if the key has all
    numbering          what the numbers of images without names stand for: two sources with the same show the same by a number
    rules              how pixels that are not plain 8-bit colours are read; the datamodule sets them for all its sources,
                       and `read_image` passes them to `decode` or `to_form`
    starts_late        the first images may take as long as reading everything before them
    """

    checked_up_front = True
    use_threads = True
    labels: Sequence[int] | NDArray[np.int64] | None = None
    columns: Mapping[str, NDArray[Any]] = {}
    label_key: str | None = None
    rules: PixelRules = PLAIN
    has_names = False
    starts_late = False
    shard_sizes: list[int] | None = None
    numbering: Any = None

    def __init__(self, n: int, key: Any) -> None:
        self.n = n
        self.key = key
        self.content_key = key

    def __len__(self) -> int:
        return self.n

    def image_ids(self) -> NDArray[np.uint64]:
        """What an image is known by wherever it lies (n,): a hash of its name, or its number where there are no names."""
        return self._ids

    @cached_property
    def _ids(self) -> NDArray[np.uint64]:
        return hash_names(self.names())

    def image_sizes(self) -> NDArray[np.int64]:
        """The sizes of the images in bytes (n,), 0 where they are not known without opening them."""
        return np.zeros(self.n, np.int64)

    def label_ids(self) -> NDArray[np.uint64]:
        """A hash of the name of each image's class (n,), where labels lie beside the images, in a table; else nothing (0,)."""
        return np.zeros(0, np.uint64)

    def raw_content(self, index: int) -> bytes | None:
        """Undecoded bytes by which an image differs from others, or None if its source has none that are quick to read."""
        return None

    def shares_names(self, other: "Source") -> bool:
        """Whether an id names the same image here and in another split, since both are parts of one set of images."""
        return False

    @abstractmethod
    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        """Pixels of this form and the label, -1 for none. Raises UnreadableImage if the image is broken."""

    def image_name(self, index: int) -> str:
        """The name of an image in messages."""
        return f"image {index}"

    def open_raw(self, index: int) -> RawImage | None:
        """An image as it is stored, for the summary of a dataset; None if that is not to be had without much reading."""
        return None

    def pick_rows(self, most: int) -> list[int]:
        """At most so many images that stand for all: evenly spread ones."""
        return spread(self.n, most)

    def names(self) -> Names:
        """What each image is known by wherever its data lie: its path below the root, or its number if it has none."""
        return range(self.n)

    def read_batch(self, indices: Sequence[int], form: Form) -> ImageBatch:
        """Images (n, *form.shape), labels (n,), and for each unreadable image its place in the batch -> the reason.

        Unreadable images are black and have the label -1.
        """
        images = np.zeros((len(indices), *form.shape), self.rules.dtype)
        labels = np.full(len(indices), -1)
        faults = {}
        for place, index in enumerate(indices):
            try:
                pixels, labels[place] = self.read_image(index, form)
                images[place] = self.rules.deepen(pixels)
            except UnreadableImage as error:
                faults[place] = str(error)
        return images, labels, faults


class FileSource(Source):
    """Image files below `root`, each with the number of its class. The key covers path, label, size and mtime of each file.

    left_out   the number of other files below the root, by their endings
    columns    those of a table, from which the labels are too; None if there is no table
    """

    left_out: Mapping[str, int] = {}

    has_names = True

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        stamps: Sequence[tuple[int, int]] | None = None,
        columns: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.root = root
        self.files = list(files)
        self.labels: list[int] = [int(label) for label in labels]
        self.classes = list(classes)
        self.stamps = list(stamps) if stamps is not None else list(map(file_stamp, self.files))
        self._root_length = (
            len(str(root / "x")) - 1
        )  # characters of each path up to its name below root
        listed = self.labels if columns is None else [0] * len(self.labels)
        listing = [(self.image_name(i), listed[i], *stamp) for i, stamp in enumerate(self.stamps)]
        super().__init__(len(files), {"root": str(root.resolve()), "files": fingerprint(listing)})
        self.content_key = {"labels": fingerprint(self.labels)}
        self.has_table = columns is not None
        if columns is not None:
            self.columns = dict(columns)
            self.label_key = fingerprint([self.labels, self.classes, hash_columns(columns)])
            self.content_key["table"] = self.label_key

    def image_sizes(self) -> NDArray[np.int64]:
        return np.array([size for size, _ in self.stamps], np.int64)

    def label_ids(self) -> NDArray[np.uint64]:
        if not self.has_table:
            return super().label_ids()
        return hash_names([*self.classes, ""])[self.labels]  # -1, none, is the last

    def shares_names(self, other: Source) -> bool:
        return isinstance(other, FileSource) and self.root == other.root

    def raw_content(self, index: int) -> bytes | None:
        """The beginning and the end of the file; nothing for one that can't be read, or that may be a named pipe."""
        size = self.stamps[index][0]
        if size <= 0:
            return b""
        try:
            with open(self.files[index], "rb") as file:
                beginning = file.read(ENDS)
                file.seek(max(len(beginning), size - ENDS))
                return beginning + file.read(ENDS)
        except OSError:
            return b""

    def names_of_classes(self) -> set[str]:
        """The names of the classes that have images here."""
        return {self.classes[label] for label in set(self.labels)}

    def subset(self, rows: Sequence[int] | NDArray[np.int64]) -> "FileSource":
        """The files with these indices."""
        files = [self.files[i] for i in rows]
        labels = [self.labels[i] for i in rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return FileSource(
            self.root,
            files,
            labels,
            self.classes,
            [self.stamps[i] for i in rows],
            columns if self.has_table else None,
        )

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        try:
            with self.open_raw(index) as file:
                content = file.read()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        return decode(content, form, self.rules), self.labels[index]

    def open_raw(self, index: int) -> IO[bytes]:
        # A file of size 0 is not opened, because it may be a named pipe, which would wait for a writer.
        if self.stamps[index][0] == 0:
            raise UnreadableImage("empty file")
        return open(self.files[index], "rb", buffering=0)

    def image_name(self, index: int) -> str:
        # Path.relative_to would take seconds for a million files.
        return str(self.files[index])[self._root_length :]

    def names(self) -> Names:
        return [self.image_name(index).replace(os.sep, "/") for index in range(self.n)]


def hash_columns(columns: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """A hash of the values of each column."""
    return {
        name: hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).hexdigest()
        for name, values in columns.items()
    }


def spread(n: int, most: int) -> list[int]:
    """At most so many of the numbers below n, evenly spread."""
    return np.linspace(0, n - 1, min(n, most)).astype(int).tolist()


def file_stamp(file: Path) -> tuple[int, int]:
    """Size in bytes and mtime in nanoseconds; (-1, -1) for a dangling link, which is reported when it is read."""
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


class SourceSubset(Source):
    """Some images of another source, given by their indices there in rising order."""

    def __init__(self, whole: Source, rows: NDArray[np.int64]) -> None:
        super().__init__(len(rows), {"whole": whole.key, "rows": fingerprint(rows.tolist())})
        self.content_key = whole.content_key
        self.whole = whole
        self.rows = rows
        self.checked_up_front = whole.checked_up_front
        self.use_threads = whole.use_threads
        if whole.labels is not None:
            self.labels = np.asarray(whole.labels)[rows]
        self.columns = {name: values[rows] for name, values in whole.columns.items()}
        self.label_key = whole.label_key
        self.has_names = whole.has_names
        self.starts_late = whole.starts_late
        if whole.shard_sizes is not None:
            shard = np.repeat(np.arange(len(whole.shard_sizes)), whole.shard_sizes)
            self.shard_sizes = [n for n in np.bincount(shard[rows]).tolist() if n]

    @property
    def rules(self) -> PixelRules:
        return self.whole.rules

    @rules.setter
    def rules(self, rules: PixelRules) -> None:
        self.whole.rules = rules

    def image_ids(self) -> NDArray[np.uint64]:
        return self.whole.image_ids()[self.rows]

    def image_sizes(self) -> NDArray[np.int64]:
        return self.whole.image_sizes()[self.rows]

    def shares_names(self, other: Source) -> bool:
        return isinstance(other, SourceSubset) and self.whole.key == other.whole.key

    def raw_content(self, index: int) -> bytes | None:
        return self.whole.raw_content(int(self.rows[index]))

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        return self.whole.read_image(int(self.rows[index]), form)

    def open_raw(self, index: int) -> RawImage | None:
        return self.whole.open_raw(int(self.rows[index]))

    def image_name(self, index: int) -> str:
        return self.whole.image_name(int(self.rows[index]))

    def names(self) -> Names:
        names: Any = self.whole.names()
        return [names[row] for row in self.rows.tolist()]


def hold_out(
    n: int, n_val: int, how: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split n images into the rising indices of those that train and of n_val that validate, by their numbers.

    The validation images are "random" ones, drawn by `seed`, or the "last". Another number of images gives another split, so
    this is the rule of earlier runs only; ImageDataModule.hold_out has today's. Raises InputError if a split would be empty.
    """
    check_held_out(how)
    check_num_held_out(n_val, n)
    order = np.random.default_rng(seed).permutation(n) if how == "random" else np.arange(n)
    return np.sort(order[:-n_val]), np.sort(order[-n_val:])
