"""Vectors of numbers as a condition: embeddings, attributes, measurements."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.engine.errors import InputError, suggest, summarize_error
from prior.conditioning.base import Condition, is_file
from prior.models.base import PriorModel

VECTOR_FILES = (".npy", ".npz")
MAX_NAMES = 1000  # different texts of a column that become a vector with a number for each
LEAST_DEVIATION = 1e-6  # of numbers that differ; others are not scaled


@dataclass(frozen=True)
class VectorPart:
    """A part of a vector: `size` numbers of a column; or its text, 1 at the place of its name among `names` and 0 elsewhere."""

    name: str
    size: int
    names: Sequence[str] | None = None

    def encode(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """A column, (n,) or (n, size) float or (n,) int64 numbers of names -> (n, size); NaN for what is missing."""
        if self.names is None:
            return values.reshape(len(values), self.size).astype(np.float32)
        encoded = np.zeros((len(values), self.size), np.float32)
        has_name = (values >= 0) & (values < self.size)
        encoded[np.flatnonzero(has_name), values[has_name]] = 1
        encoded[~has_name] = np.nan
        return encoded

    def read(self, value: Any) -> NDArray[np.float32]:
        """What a command gives for this part, one value or several -> (m, size). Raises InputError."""
        if self.names is None:
            return read_numbers(value, self.size, f"condition.{self.name}")
        several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return self.encode(np.array([self._find(each) for each in several], np.int64))

    def _find(self, name: Any) -> int:
        assert self.names is not None
        if name is None:
            return -1
        if str(name) not in self.names:
            names = list(self.names)
            raise InputError(
                f"condition.{self.name}={name} is none of the names that were learned{suggest(str(name), names) or ';'} there is "
                f"{', '.join(names[:10])}{f' and {len(names) - 10:,} more' if len(names) > 10 else ''}"
            )
        return list(self.names).index(str(name))


def describe_column(name: str, values: NDArray[Any], names: Sequence[str] | None) -> VectorPart:
    """The part of a vector that a column becomes; `names` are those of a column of text. Raises InputError for too many."""
    if names is None:
        return VectorPart(name, int(np.prod(values.shape[1:])))
    if len(names) > MAX_NAMES:
        raise InputError(
            f"condition={name} is a column of {len(names):,} different texts, and at most {MAX_NAMES:,} become a vector; encode "
            "captions by a network of your choice, and give condition=embeddings.npy"
        )
    return VectorPart(name, len(names), list(names))


class VectorCondition(Condition):
    """Vectors of `size` numbers, one after the other those of the `parts`, which are columns of the images or the one part of a
    file.

    The model standardises them by `mean` and `deviation` (size,), which `fit` takes from the training images, or which come
    with the model's weights.
    """

    def __init__(self, parts: Sequence[VectorPart], of_columns: bool) -> None:
        self.parts, self.of_columns = list(parts), of_columns
        self.size = sum(part.size for part in parts)
        self.mean, self.deviation = torch.zeros(self.size), torch.ones(self.size)

    def fit(self, vectors: NDArray[np.float32]) -> None:
        """Take mean and deviation from vectors (n, size), each number's from those that have it."""
        counts = np.zeros(self.size)
        sums, squares = np.zeros(self.size), np.zeros(self.size)
        for first in range(0, len(vectors), 4096):  # which may be a memory map of many large ones
            rows = np.asarray(vectors[first : first + 4096], np.float64)
            counts += (~np.isnan(rows)).sum(0)
            sums += np.nansum(rows, 0)
            squares += np.nansum(rows**2, 0)
        mean = sums / counts.clip(min=1)
        deviation = np.sqrt((squares / counts.clip(min=1) - mean**2).clip(min=0))
        is_constant = deviation <= LEAST_DEVIATION * np.abs(mean).clip(min=1e-30)
        self.mean = torch.from_numpy(mean.astype(np.float32))
        self.deviation = torch.from_numpy(np.where(is_constant, 1, deviation).astype(np.float32))

    def attach(self, model: PriorModel) -> None:
        model.read_vectors(self.mean, self.deviation)

    def describe(self) -> dict[str, Any]:
        parts = [{"name": p.name, "size": p.size, "names": p.names} for p in self.parts]
        return {"kind": "vectors", "of_columns": self.of_columns, "parts": parts}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "VectorCondition":
        """The condition that `describe` has described."""
        parts = [VectorPart(p["name"], p["size"], p["names"]) for p in description["parts"]]
        return cls(parts, description["of_columns"])

    @property
    def columns(self) -> list[str]:
        """The columns of the images that it is of."""
        return [part.name for part in self.parts] if self.of_columns else []

    def summarize(self) -> str:
        several = "s" if self.size > 1 else ""
        if not self.of_columns:
            return f"vectors of {self.size} number{several}"
        named = ", ".join(f"{part.name} ({part.size})" for part in self.parts)
        return f"vectors of {self.size} number{several}: {named}"

    def read(self, value: Any) -> Tensor:
        """A vector or several, as lists, arrays or tensors; a .npy or .npz file of them; or a mapping of columns to their values,
        of which those that are left out count as missing."""
        if isinstance(value, Mapping) and self.of_columns:
            return torch.from_numpy(self.read_columns(value))
        if is_file(value, VECTOR_FILES):
            value = np.asarray(load_vectors(Path(value).expanduser(), f"condition={value}").vectors)
        elif isinstance(value, str):
            columns = f", or columns as {{{self.parts[0].name}: ...}}" if self.of_columns else ""
            raise InputError(
                f"condition={value} is no vector; give {self.size} numbers as [0.5,2], a .npy file of them{columns}"
            )
        return torch.from_numpy(read_numbers(value, self.size, "condition", self.summarize()))

    def read_columns(self, values: Mapping[str, Any]) -> NDArray[np.float32]:
        """The vectors (m, size) of columns, each with one value for all or as many as the others have."""
        names = [part.name for part in self.parts]
        for name in values:
            if name not in names:
                raise InputError(
                    f"condition.{name} is none of the columns that were learned{suggest(str(name), names) or ';'} there is "
                    f"{', '.join(names)}"
                )
        read = {
            part.name: part.read(values[part.name]) for part in self.parts if part.name in values
        }
        lengths = {len(part) for part in read.values()} - {1}
        if len(lengths) > 1:
            raise InputError(
                f"condition has columns of {' and '.join(map(str, sorted(lengths)))} values; give one for all, or as many in each"
            )
        n = max(lengths, default=1)
        blank = np.full((1, self.size), np.nan, np.float32)
        ends = np.cumsum([part.size for part in self.parts])
        filled = [
            read.get(part.name, blank[:, end - part.size : end])
            for part, end in zip(self.parts, ends, strict=True)
        ]
        return np.concatenate([np.broadcast_to(part, (n, part.shape[1])) for part in filled], 1)


def read_numbers(value: Any, size: int, what: str, summary: str = "") -> NDArray[np.float32]:
    """One vector of `size` numbers or several -> (m, size) float32; None is a missing number. Raises InputError."""
    learned = summary or f"{size} number{'s' if size > 1 else ''}"
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu().float().numpy()
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}={value} must be numbers; this prior learned {learned}") from error
    if array.ndim < 2:
        array = array.reshape(-1, 1) if size == 1 else array.reshape(1, -1)
    if array.ndim != 2 or array.shape[1] != size:
        shape = "x".join(map(str, array.shape))
        raise InputError(
            f"{what} has vectors of shape {shape}, and this prior learned {learned}; give {size} in each"
        )
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if np.isinf(numbers).any():
        raise InputError(
            f"{what} has infinite numbers; give finite ones, or null for a missing one"
        )
    return numbers


@dataclass(frozen=True)
class VectorFile:
    """The vectors (m, size) of a file, and the names (m,) of their images if it has them."""

    vectors: NDArray[Any]
    names: list[str] | None = None


def load_vectors(file: Path, what: str) -> VectorFile:
    """The vectors of a .npy, (m, size) or (m,) numbers, or of an .npz with the arrays `vectors` and `names`.

    Raises InputError, which begins with `what`, for a file that is none of these.
    """
    if not file.is_file():
        raise InputError(f"{what} is not there; give a .npy or .npz file of vectors")
    try:
        arrays = read_arrays(file)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{what} can't be read as an array ({summarize_error(error)}); write it with numpy.save(file, vectors) or "
            "numpy.savez(file, names=names, vectors=vectors)"
        ) from error
    if "vectors" not in arrays:
        raise InputError(
            f"{what} has the arrays {', '.join(arrays) or 'of none'}, and needs vectors, and names of their images; write it "
            "with numpy.savez(file, names=names, vectors=vectors)"
        )
    vectors = arrays["vectors"]
    if vectors.ndim == 1:
        vectors = vectors[:, None]
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiub" or not vectors.shape[1]:
        raise InputError(
            f"{what} holds an array of shape {list(vectors.shape)} and type {vectors.dtype}; give (images, size) numbers"
        )
    names = list(map(read_name, arrays["names"].tolist())) if "names" in arrays else None
    if names is not None and len(names) != len(vectors):
        raise InputError(
            f"{what} has {len(names):,} names for {len(vectors):,} vectors; give one for each"
        )
    return VectorFile(vectors, names)


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz, or that of a .npy as `vectors`, which is not read yet."""
    with open(file, "rb") as stream:
        if stream.read(2) == b"PK":
            stream.seek(0)
            return dict(np.load(stream, allow_pickle=False))
    return {"vectors": np.load(file, mmap_mode="r", allow_pickle=False)}


def read_name(name: Any) -> str:
    """A name of an array of text, of bytes or of numbers."""
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def check_finite(vectors: NDArray[np.float32], what: str, names: Iterable[str]) -> None:
    """Raise InputError for vectors (n, size) of images with infinite numbers; NaN is a missing one."""
    is_infinite = np.isinf(vectors).any(1)
    if is_infinite.any():
        listed = list(names)
        first = int(np.flatnonzero(is_infinite)[0])
        raise InputError(
            f"{what} has infinite numbers for {int(is_infinite.sum()):,} images, such as {listed[first]}; give finite ones, or NaN "
            "for what is missing"
        )
