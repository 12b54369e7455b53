"""Tensors that stay on the disk until somebody asks for them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


class Weight(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Tensor:
        """The values; they may lie on the disk, in pages that leave the memory with the tensor."""


class Storages:
    """Where each storage of a file of torch.save begins, and how many bytes it has, by its key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.spans: dict[str, tuple[int, int]] = {}


class Stored(NamedTuple):
    """A tensor in a file of torch.save: a view of one of its storages.

    A tuple, since a pickle can set the attributes of other objects, and this one says what is read.
    """

    storages: Storages
    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        start, size = self.storages.spans[self.key]
        if size == 0 or 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        mapped = np.memmap(self.storages.file, np.uint8, mode="c", offset=start, shape=(size,))
        values = torch.from_numpy(mapped)
        if start % self.dtype.itemsize:  # in files of torch before 1.6, which align nothing
            values = values.clone()
        whole = values[: size - size % self.dtype.itemsize].view(self.dtype)
        return whole.as_strided(self.shape, self.stride, self.offset)

    @property
    def size(self) -> int:
        """Bytes of its storage up to its last element."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum(
            (n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)
        )
        return (last + 1) * self.dtype.itemsize


class SafeStored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as opened:  # anew, so that its pages can leave the memory
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor


class DiskTensors(Mapping[str, Tensor]):
    """Tensors by name, each read anew when it is asked for; half precision comes as float32."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = dict(weights)

    def __getitem__(self, name: str) -> Tensor:
        values = self._weights[name].read()
        return values.float() if values.dtype in HALVES else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def count_numbers(weights: Mapping[str, Weight]) -> int:
    """How many numbers these tensors have."""
    return sum(math.prod(weight.shape) for weight in weights.values())
