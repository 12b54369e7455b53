"""Arrays on disk under a key: written whole or not at all, shared by all runs, opened as memory maps."""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray

from engine.console import log_line
from engine.errors import InputError

Arrays = dict[str, NDArray[Any]]
Spec = Mapping[str, tuple[tuple[int, ...], DTypeLike]]
SOON = 2  # seconds after which a person wants to know what a run waits for


def fingerprint(key: Any) -> str:
    """Twelve hexadecimal digits of whatever JSON can write; the order of a mapping's keys does not matter."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


class Entry:
    """The arrays of `spec` (name -> shape, dtype) under a key, in `folder/name-<fingerprint of key and spec>/`.

    They are filled in a part folder, which gets its final name when it is complete: a killed run leaves nothing that
    looks finished. Whoever fills holds the lock, so that a second run waits and then reads; the system frees the lock of
    a killed run.
    """

    def __init__(self, folder: str | Path, name: str, key: Any, spec: Spec) -> None:
        self.spec, self.key = spec, key
        self.shapes = {
            array: [*map(int, shape), np.dtype(dtype).str] for array, (shape, dtype) in spec.items()
        }
        self.final = Path(folder) / f"{name}-{fingerprint([key, self.shapes])}"
        self.part = self.final.with_name(f".{self.final.name}.part")
        self.lock = FileLock(self.final.with_name(f".{self.final.name}.lock"))

    def acquire(self) -> AbstractContextManager[Any]:
        """The lock, taken now and freed by the `with` that this is for; says so where another run holds it."""
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            try:
                return self.lock.acquire(timeout=SOON)
            except Timeout:
                log_line(f"{self.final} is being made by another run; waiting for it")
                return self.lock.acquire()
        except OSError as error:
            raise self._refused(error) from error

    def read(self) -> Arrays | None:
        """The arrays, read-only, or None where there are none or they are damaged, which is said."""
        if not os.path.exists(self.final / "meta.json"):
            return None
        try:
            arrays: Arrays = {
                name: np.load(self.final / f"{name}.npy", mmap_mode="r") for name in self.spec
            }
            meta = self.meta()
            wrong = [
                name for name, sum in meta["sums"].items() if zlib.crc32(arrays[name].data) != sum
            ]
            if not wrong and "notes" in meta:
                return arrays
            reason = f"{wrong[0]}.npy's checksum is wrong" if wrong else "meta.json has no notes"
        except Exception as error:  # a damaged file can make a reader stumble over anything
            reason = f"{type(error).__name__}: {error}"
        log_line(f"{self.final} is damaged ({reason}); it is made anew")
        return None

    def meta(self) -> dict[str, Any]:
        """What meta.json says: key, arrays, sums and notes."""
        found: dict[str, Any] = json.loads((self.final / "meta.json").read_text())
        return found

    def begin(self) -> Arrays:
        """Empty arrays in the part folder, with room on the disk for all of them."""
        shutil.rmtree(self.part, ignore_errors=True)
        try:
            self.part.mkdir(parents=True)
            for name, (shape, dtype) in self.spec.items():
                mapped = np.lib.format.open_memmap(
                    self.part / f"{name}.npy", "w+", np.dtype(dtype), shape
                )
                del mapped
                with (self.part / f"{name}.npy").open("r+b") as file:
                    if hasattr(
                        os, "posix_fallocate"
                    ):  # or a full disk would kill the process when it writes to the map
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            shutil.rmtree(self.part, ignore_errors=True)
            raise self._refused(error) from error
        return self.go_on()

    def go_on(self) -> Arrays:
        """The part folder's arrays as an earlier `begin`, perhaps of a killed run, left them."""
        return {name: np.load(self.part / f"{name}.npy", mmap_mode="r+") for name in self.spec}

    def publish(self, arrays: Arrays, notes: Any = None, summed: tuple[str, ...] = ()) -> None:
        """Give the part folder its final name. `notes` go into meta.json, and the checksums of the arrays `summed`."""
        flush(*arrays.values())
        sums = {name: zlib.crc32(arrays[name].data) for name in summed}
        meta = {"key": self.key, "arrays": self.shapes, "sums": sums, "notes": notes}
        try:
            (self.part / "meta.json").write_text(json.dumps(meta, indent=2))
            shutil.rmtree(self.final, ignore_errors=True)  # a damaged one
            os.replace(self.part, self.final)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> InputError:
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
    """Bring memory maps to the disk."""
    for array in mapped:
        array.flush()  # type: ignore[attr-defined]


def stored(
    folder: str | Path, name: str, key: Any, spec: Spec, fill: Callable[[Arrays], Any]
) -> tuple[Arrays, Any]:
    """An entry's arrays and the notes that `fill` returned with them, filled now where no earlier run has."""
    entry = Entry(folder, name, key, spec)
    if (found := entry.read()) is None:
        with entry.acquire():
            if (found := entry.read()) is None:  # nobody made it while we waited
                try:
                    arrays = entry.begin()
                    entry.publish(arrays, fill(arrays))
                finally:
                    shutil.rmtree(entry.part, ignore_errors=True)
                found = entry.read()
    assert found is not None
    return found, entry.meta()["notes"]
