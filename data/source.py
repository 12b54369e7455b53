"""Where the images of a split come from, before any of them is kept."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.decode import Unreadable, decode
from data.store import fingerprint
from engine.errors import InputError

Read = tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, str]]


class Source(ABC):
    """n images with labels, each read when it is asked for.

    `key` is what JSON can write of their content: what is made of the images is made anew when it changes. `shards` are
    how many images lie in each file, in order, where jumping from file to file is slow. `checked` says that all are
    read once before training begins, so that nothing broken turns up later; `parallel` that threads may read at once.
    """

    checked = True
    parallel = True
    shards: list[int] | None = None

    def __init__(self, n: int, key: Any) -> None:
        self.n, self.key = n, key

    def __len__(self) -> int:
        return self.n

    @abstractmethod
    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        """Image (channels, side, side) and label, -1 where there is none; Unreadable where it is broken."""

    def name(self, index: int) -> str:
        """What a person calls this image."""
        return f"image {index}"

    def read(self, indices: Sequence[int], side: int, channels: int) -> Read:
        """Images (n, channels, side, side), black where they are broken, labels (n,), and what is wrong at which places."""
        images, labels = (
            np.zeros((len(indices), channels, side, side), np.uint8),
            np.full(len(indices), -1),
        )
        faults = {}
        for place, index in enumerate(indices):
            try:
                images[place], labels[place] = self.one(index, side, channels)
            except Unreadable as error:
                faults[place] = str(error)
        return images, labels, faults


class Files(Source):
    """Image files below `root`, each with the number of its class. Their content is known by path, label, size and time."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        stamps: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.root, self.files, self.labels, self.classes = (
            root,
            list(files),
            [int(label) for label in labels],
            list(classes),
        )
        self.stamps = list(stamps) if stamps is not None else [stamp(file) for file in self.files]
        self._above = (
            len(str(root / "x")) - 1
        )  # characters of each path that are not its name below the root
        listing = [(self.name(i), self.labels[i], *stamp) for i, stamp in enumerate(self.stamps)]
        super().__init__(len(files), {"root": str(root.resolve()), "files": fingerprint(listing)})

    def part(self, rows: Sequence[int] | NDArray[np.int64]) -> "Files":
        """Those files alone."""
        files, labels = [self.files[i] for i in rows], [self.labels[i] for i in rows]
        return Files(self.root, files, labels, self.classes, [self.stamps[i] for i in rows])

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        if (
            self.stamps[index][0] == 0
        ):  # not opened, for it may be a named pipe, which would wait for a writer
            raise Unreadable("empty file")
        try:
            with open(self.files[index], "rb", buffering=0) as file:
                content = file.read()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        return decode(content, side, channels), self.labels[index]

    def name(self, index: int) -> str:
        return str(self.files[index])[
            self._above :
        ]  # pathlib's own way takes seconds for a million files


def stamp(file: Path) -> tuple[int, int]:
    """Size in bytes and time in nanoseconds."""
    try:
        found = file.stat()
    except OSError:  # a dangling link: it is named when it is read
        return -1, -1
    return found.st_size, found.st_mtime_ns


class SourcePart(Source):
    """Some images of another source, by their numbers there in rising order."""

    def __init__(self, whole: Source, rows: NDArray[np.int64]) -> None:
        super().__init__(len(rows), {"whole": whole.key, "rows": fingerprint(rows.tolist())})
        self.whole, self.rows, self.checked, self.parallel = (
            whole,
            rows,
            whole.checked,
            whole.parallel,
        )
        if whole.shards is not None:
            shard = np.repeat(np.arange(len(whole.shards)), whole.shards)
            self.shards = [n for n in np.bincount(shard[rows]).tolist() if n]

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        return self.whole.one(int(self.rows[index]), side, channels)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.rows[index]))


def hold_out(
    n: int, n_val: int, how: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers, rising, of the images that are for training and of the n_val that are held out: "random" or the "last"."""
    if how not in ("random", "last"):
        raise InputError(f"data.held_out={how} must be random or last")
    if not isinstance(n_val, int) or not 0 < n_val < n:
        raise InputError(f"data.n_val={n_val} must leave both splits an image; there are {n}")
    order = np.random.default_rng(seed).permutation(n) if how == "random" else np.arange(n)
    return np.sort(order[:-n_val]), np.sort(order[-n_val:])
