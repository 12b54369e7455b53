"""Arrays on disk under a key: written whole or not at all, opened as memory maps."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data.errors import InputError

Arrays = dict[str, NDArray[Any]]
Spec = Mapping[str, tuple[tuple[int, ...], DTypeLike]]


def fingerprint(key: Any) -> str:
    """Twelve hexadecimal digits of whatever JSON can write; the order of a mapping's keys does not matter."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def stored(folder: str | Path, name: str, key: Any, spec: Spec, fill: Callable[[Arrays], None]) -> Arrays:
    """The arrays of `spec` (name -> shape, dtype), read-only, made by `fill` where no earlier run has left them.

    They live in `folder/name-<fingerprint of key and spec>/`. `fill` writes into a temporary folder that gets its final
    name when it is complete: a killed run leaves nothing that looks finished, and of two runs at once the first wins.
    """
    shapes = {array: [*map(int, shape), np.dtype(dtype).str] for array, (shape, dtype) in spec.items()}
    final = Path(folder) / f"{name}-{fingerprint([key, shapes])}"
    if not (final / "meta.json").exists():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=folder))
        except OSError as error:
            raise InputError(f"can't write the cache folder {folder} ({error}); name another with cache_dir=...") from error
        try:
            arrays: Arrays = {
                array: np.lib.format.open_memmap(temporary / f"{array}.npy", "w+", np.dtype(dtype), shape)
                for array, (shape, dtype) in spec.items()
            }
            fill(arrays)
            for mapped in arrays.values():
                mapped.flush()  # type: ignore[attr-defined]
            (temporary / "meta.json").write_text(json.dumps({"key": key, "arrays": shapes}, indent=2))
            if not (final / "meta.json").exists():
                os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {array: np.load(final / f"{array}.npy", mmap_mode="r") for array in spec}
