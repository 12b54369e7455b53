"""The samples of a split, fetched a batch at a time: from arrays, or decoded from a source on each access."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from codegrid.data.decode import UnreadableImage
from codegrid.data.form import Form
from codegrid.data.source import Source
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError


def from_numpy(values: NDArray[Any]) -> Tensor:
    """An array as a tensor; unsigned integers of 16 or more bits as signed ones of twice as many.

    torch can't index an embedding with unsigned ones, and lacks most operations for them.
    """
    if values.dtype.kind == "u" and values.dtype != np.uint8:
        values = values.astype(np.int32 if values.dtype == np.uint16 else np.int64)
    return torch.from_numpy(values)


@dataclass
class MappedArray:
    """A .npy file that is opened as a memory map instead of being read."""

    file: str


class ArraySamples(Dataset[tuple[Tensor, Tensor]]):
    """Samples (value, label) from `values` (n, ...) and `labels` (n, ...), restricted to `rows` if they are not None.

    Labels are whole numbers, or vectors of float32. `columns` are further values of the images, (images, ...). Where there are
    several views of each image, sample i is of image i modulo their number; labels may be those of the images too.
    """

    columns: Mapping[str, NDArray[Any]] = {}
    shard_sizes: list[int] | None = None
    starts_late = False

    def __init__(
        self, values: NDArray[Any], labels: NDArray[Any], rows: NDArray[np.int64] | None = None
    ) -> None:
        self.values = values
        self.labels = labels
        self.rows = rows

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps are sent to worker processes by file name, because pickling them would copy the whole array."""
        return {
            name: MappedArray(str(value.filename)) if isinstance(value, np.memmap) else value
            for name, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {
            name: np.load(value.file, mmap_mode="r") if isinstance(value, MappedArray) else value
            for name, value in state.items()
        }
        self.__dict__.update(opened)

    @property
    def sample_bytes(self) -> int:
        """The size of a sample in memory."""
        value = from_numpy(self.values[:0])
        label = math.prod(self.labels.shape[1:]) * 8
        return math.prod(self.values.shape[1:]) * value.itemsize + label

    def __len__(self) -> int:
        return len(self.values if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        values, labels = self.__getitems__([index])
        return values[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        labels = self.labels[rows % len(self.labels)]
        label_type = np.float32 if labels.dtype.kind == "f" else np.int64
        return from_numpy(self.values[rows]), torch.from_numpy(labels.astype(label_type))


class LiveSamples(Dataset[tuple[Tensor, Tensor]]):
    """Images of a source, decoded on each access and restricted to `rows` if they are not None.

    An image can turn out unreadable here if it broke after all images were checked, or if its source is too large to be
    checked. It is then replaced by another image of its batch, or by one of the next `MAX_SKIPPED` images if the whole
    batch is unreadable. With `stop` it raises InputError instead.
    """

    MAX_SKIPPED = 64  # if this many images in a row are unreadable, the disk is probably gone

    def __init__(
        self,
        source: Source,
        rows: NDArray[np.int64] | None,
        form: Form,
        stop: bool = False,
    ) -> None:
        self.source = source
        self.rows = rows
        self.form = form
        self.stop = stop
        self.shard_sizes = source.shard_sizes if rows is None else None
        self.starts_late = source.starts_late
        self._reported: set[int] = set()

    @property
    def sample_bytes(self) -> int:
        """The size of a sample in memory."""
        itemsize = 1 if self.source.rules.depth == 8 else 4  # see from_numpy
        return math.prod(self.form.shape) * itemsize + 8

    def __len__(self) -> int:
        return len(self.source if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = list(indices) if self.rows is None else self.rows[indices].tolist()
        images, labels, faults = self.source.read_batch(chosen, self.form)
        images = self.source.rules.deepen(images)
        readable = [
            (images[place], labels[place]) for place in range(len(chosen)) if place not in faults
        ]
        for n, (place, reason) in enumerate(faults.items()):
            self._report(chosen[place], reason)
            readable = readable or [self._read_next(chosen[place], reason)]
            images[place], labels[place] = readable[n % len(readable)]
        return from_numpy(images), torch.from_numpy(labels)

    def _report(self, index: int, reason: str) -> None:
        """Log an unreadable image the first time it is met, or stop at it."""
        name = self.source.image_name(index)
        if self.stop:
            raise_unreadable({name: reason})
        if index not in self._reported:
            self._reported.add(index)
            log_line(f"{name} can't be read ({reason}); another image takes its place")

    def _read_next(self, index: int, reason: str) -> tuple[NDArray[Any], int]:
        """The first readable image after an unreadable one."""
        for other in range(index + 1, index + 1 + self.MAX_SKIPPED):
            with suppress(UnreadableImage):
                pixels, label = self.source.read_image(other % len(self.source), self.form)
                return self.source.rules.deepen(pixels), label
        raise InputError(
            f"{self.source.image_name(index)} can't be read ({reason}), nor the {self.MAX_SKIPPED} after it; "
            "is the disk still there?"
        )


def raise_unreadable(faults: dict[str, str]) -> None:
    """Raise InputError about the first of the unreadable images, given as name -> reason."""
    name, reason = next(iter(faults.items()))
    raise InputError(
        f"{name} can't be read as an image ({reason}); repair it or take it out, or leave out all such with data.on_error=skip"
    )
