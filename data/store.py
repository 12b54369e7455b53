"""A cache of arrays on disk: entries are complete or absent, shared by all runs and opened as memory maps."""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.figures import format_figures
from codegrid.engine.locks import Lock

Arrays = dict[str, NDArray[Any]]
Spec = Mapping[str, tuple[tuple[int, ...], DTypeLike]]


def fingerprint(key: Any) -> str:
    """A hash of anything that JSON can write, as 12 hexadecimal digits; the order of mapping keys does not matter."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


class CacheEntry:
    """The arrays of `spec` (name -> shape, dtype) for a key, in `folder/name-<fingerprint of key and spec>/`.

    Arrays are filled in a hidden ".part" folder, which is renamed when it is complete, so a killed run leaves nothing that
    looks finished. The run that fills an entry holds its lock; a second run waits and then reads. The lock of a killed
    run is free (engine/locks.py).
    """

    def __init__(self, folder: str | Path, name: str, key: Any, spec: Spec) -> None:
        self.spec = spec
        self.key = key
        self.shapes = {
            array: [*map(int, shape), np.dtype(dtype).str] for array, (shape, dtype) in spec.items()
        }
        self.final = Path(folder) / f"{name}-{fingerprint([key, self.shapes])}"
        self.part = self.final.with_name(f".{self.final.name}.part")
        self.lock = Lock(self.final.with_name(f".{self.final.name}.lock"))

    def acquire(self) -> Lock:
        """Take the lock, to be used in a `with` statement that releases it. Logs a line if another run holds it for long."""
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            return self.lock.wait(str(self.final), "name another folder with cache_dir=...")
        except OSError as error:
            raise self._explain(error) from error

    def read(self) -> Arrays | None:
        """The arrays, read-only, or None if the entry is missing, or damaged, which is logged."""
        if not os.path.exists(self.final / "meta.json"):
            return None
        try:
            arrays: Arrays = {
                name: np.load(self.final / f"{name}.npy", mmap_mode="r") for name in self.spec
            }
            meta = self.read_meta()
            checksums = meta["sums"].items()
            wrong = [name for name, crc in checksums if zlib.crc32(arrays[name].data) != crc]
            if not wrong and "notes" in meta:
                return arrays
            reason = f"{wrong[0]}.npy's checksum is wrong" if wrong else "meta.json has no notes"
        except Exception as error:  # damaged files make readers raise all kinds of exceptions
            reason = f"{type(error).__name__}: {error}"
        log_line(f"{self.final} is damaged ({reason}); it is made anew")
        return None

    def read_meta(self) -> dict[str, Any]:
        """The content of meta.json: key, arrays, sums (checksums) and notes."""
        meta: dict[str, Any] = json.loads((self.final / "meta.json").read_text())
        return meta

    def create(self) -> Arrays:
        """Empty arrays in the part folder, with disk space allocated for all of them. Raises InputError if there is none."""
        shutil.rmtree(self.part, ignore_errors=True)
        try:
            self.part.mkdir(parents=True)
            for name, (shape, dtype) in self.spec.items():
                mapped = np.lib.format.open_memmap(
                    self.part / f"{name}.npy", "w+", np.dtype(dtype), shape
                )
                del mapped
                with (self.part / f"{name}.npy").open("r+b") as file:
                    # Without allocation a full disk would kill the process when it writes to the map.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            shutil.rmtree(self.part, ignore_errors=True)
            raise self._explain(error) from error
        return self.reopen()

    def reopen(self) -> Arrays:
        """The arrays of the part folder as an earlier run, which may have been killed, left them."""
        return {name: np.load(self.part / f"{name}.npy", mmap_mode="r+") for name in self.spec}

    def publish(self, arrays: Arrays, notes: Any = None, checksummed: tuple[str, ...] = ()) -> None:
        """Give the part folder its final name. meta.json gets the notes and checksums of the arrays `checksummed`."""
        flush(*arrays.values())
        sums = {name: zlib.crc32(arrays[name].data) for name in checksummed}
        meta = {"key": self.key, "arrays": self.shapes, "sums": sums, "notes": notes}
        try:
            (self.part / "meta.json").write_text(format_figures(meta, indent=2))
            shutil.rmtree(self.final, ignore_errors=True)  # a damaged entry
            os.replace(self.part, self.final)
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> InputError:
        size = sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.spec.values()
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(
                f"no room for {size / 2**20:,.0f} MiB in {self.final.parent}; name another folder with cache_dir=..."
            )
        return InputError(
            f"can't write the cache folder {self.final.parent} ({error}); name another with cache_dir=..."
        )


def flush(*mapped: NDArray[Any]) -> None:
    """Write memory maps to disk."""
    for array in mapped:
        array.flush()  # type: ignore[attr-defined]


def load_or_fill(
    folder: str | Path, name: str, key: Any, spec: Spec, fill: Callable[[Arrays], Any]
) -> tuple[Arrays, Any]:
    """The arrays of a cache entry and its notes. `fill` writes the arrays and returns the notes if no earlier run did."""
    entry = CacheEntry(folder, name, key, spec)
    arrays = entry.read()
    if arrays is None:
        with entry.acquire():
            arrays = entry.read()  # another run may have filled it while this one waited
            if arrays is None:
                try:
                    new = entry.create()
                    entry.publish(new, fill(new))
                finally:
                    shutil.rmtree(entry.part, ignore_errors=True)
                arrays = entry.read()
    assert arrays is not None
    return arrays, entry.read_meta()["notes"]
