"""Images in shards of litdata, on a disk or in a bucket: what outgrows one disk, or is too many files for a folder."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from data.datamodule import ImageDataModule
from data.decode import Unreadable, decode, square
from data.loading import BatchOrder
from data.source import Source, SourcePart, hold_out
from engine.errors import InputError

GB = 10**9  # bytes


class Shards(Source):
    """The images of a dataset that litdata.optimize wrote, in the order of its shards.

    `root` is a folder or a URL (s3://, gs://, azure://, r2://). A shard of a URL is fetched whole when an image of
    it is asked for, once for all processes of a machine, and stays below `cache_dir` while the shards there fit into
    `local_cache` GB; those that were not used for longest go first. litdata would do this for its own order of images
    alone: asked for them by number it fetches each one by itself, in every epoch again.
    """

    checked = False
    parallel = False  # a reader of litdata holds one image at a time

    chunks: list[dict[str, Any]]  # of index.json

    def __init__(
        self,
        root: str,
        setting: str,
        image: str,
        label: str | None,
        cache_dir: str,
        local_cache: float,
    ) -> None:
        try:
            import litdata  # noqa: F401
        except ImportError as error:
            raise InputError(
                'data=litdata needs the library litdata; pip install "codegrid[litdata]"'
            ) from error
        self.remote = "://" in root or root.startswith("local:")
        self.root = root if self.remote else str(Path(root).expanduser())
        self.image, self.limit, self.chunks = image, local_cache * GB, []
        text = self._index(setting)
        try:
            index = json.loads(text)
            self.chunks, config = index["chunks"], index["config"]
            kind, formats = json.loads(config["data_spec"])[1], config["data_format"]
            columns = json.loads(kind["context"]) if kind["type"] == "builtins.dict" else []
            self.shards = [chunk["chunk_size"] for chunk in self.chunks]
            self.ends = np.cumsum(self.shards)
            n = int(self.ends[-1])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{setting}={root} has an index.json that is not litdata's ({error!r}); write it anew"
            ) from error
        if image not in columns:
            raise InputError(
                f"{setting}={root} has no {image} in its items but {', '.join(columns) or 'no names'}; set data.image="
            )
        if "pickle" in formats:
            raise InputError(
                f"{setting}={root} holds pickled objects, which could run any code; write bytes, arrays and numbers"
            )
        if config.get("compression") or config.get("encryption"):
            raise InputError(
                f"{setting}={root} is compressed or encrypted; write it plain, encoded images don't get smaller"
            )
        self.label = label if label in columns else None
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = Path(cache_dir, f"shards-{digest}") if self.remote else Path(self.root)
        if self.remote:
            self._check_room()
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".index.json.{os.getpid()}"
            part.write_text(text)
            part.replace(self.folder / "index.json")  # other processes may read it by now
        self._reader: tuple[int, Any] = (0, None)
        super().__init__(n, {"index": digest, "image": image, "label": self.label})

    def _index(self, setting: str) -> str:
        if self.remote:
            with tempfile.TemporaryDirectory() as folder:
                self._fetch("index.json", Path(folder, "index.json"))
                return Path(folder, "index.json").read_text()
        if not Path(self.root, "index.json").is_file():
            raise InputError(
                f"{setting}={self.root} holds no index.json; give a folder that litdata.optimize wrote (docs/data.md)"
            )
        return Path(self.root, "index.json").read_text()

    def _fetch(self, name: str, file: Path) -> None:
        from litdata.streaming.downloader import get_downloader

        try:
            get_downloader(self.root, str(file.parent), self.chunks).download_file(
                f"{self.root.rstrip('/')}/{name}", str(file)
            )
        except Exception as error:  # every kind of storage has a client with exceptions of its own
            raise InputError(
                f"{name} can't be fetched from {self.root} ({' '.join(str(error).split())[:200]})"
            ) from error

    def _check_room(self) -> None:
        sizes = [chunk["chunk_bytes"] for chunk in self.chunks]
        least = min(
            sum(sizes), 2 * BatchOrder.OPEN * max(sizes)
        )  # those that are read from, and those that come next
        if self.limit < least:
            raise InputError(
                f"data.local_cache={self.limit / GB:g} GB is too small for these shards; use at least {least / GB:.3g}"
            )

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        chunk = self.chunks[int(np.searchsorted(self.ends, index, side="right"))]
        file = self.folder / Path(chunk["filename"]).name
        if self.remote:
            self._bring(file, chunk["chunk_bytes"])
        try:
            item = self._open()[index]
        except Exception as error:  # of any of its decoders
            if not file.is_file() or file.stat().st_size < chunk["chunk_bytes"]:
                raise InputError(f"the shard {file} is missing or cut off; copy it anew") from error
            raise Unreadable(" ".join(str(error).split())[:200] or type(error).__name__) from error
        return pixels(item[self.image], side, channels), -1 if self.label is None else self._number(
            item[self.label]
        )

    def _number(self, label: Any) -> int:
        try:
            return int(label)
        except (TypeError, ValueError):
            raise InputError(
                f"data.label={self.label} must be the numbers of classes, not {label!r}; use data.label=null"
            ) from None

    def _open(self) -> Any:
        """litdata's reader, one for each process: a mapped file and a place in it don't survive a fork."""
        from litdata import StreamingDataset

        pid, reader = self._reader
        if pid != os.getpid():
            # It keeps as many shards mapped as it may fetch ahead, and never fetches from a folder.
            reader = StreamingDataset(str(self.folder), max_pre_download=BatchOrder.OPEN)
            self._reader = os.getpid(), reader
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": (0, None)}

    def _bring(self, file: Path, size: int) -> None:
        """Have a shard in the local folder, marked as used now."""
        with suppress(FileNotFoundError):
            os.utime(file)
            return
        with FileLock(file.with_name(f".{file.name}.lock")):
            if file.exists():  # another process was first
                return
            self._make_room(size)
            part = file.with_name(f".{file.name}.{os.getpid()}")
            self._fetch(file.name, part)
            if part.stat().st_size != size:
                part.unlink()
                raise InputError(
                    f"{self.root}/{file.name} is not as long as index.json says; was it written while we read?"
                )
            part.replace(file)

    def _make_room(self, size: int) -> None:
        """Delete what was not used for longest. Whoever has such a shard mapped goes on reading it."""
        found: list[tuple[int, int, Path]] = []
        for file in self.folder.glob("*.bin"):
            with suppress(FileNotFoundError):  # other processes make room too
                found.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        excess = size + sum(held for _, held, _ in found) - self.limit
        for _, held, file in sorted(found):
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= held


def pixels(value: Any, side: int, channels: int) -> NDArray[np.uint8]:
    """An item's image as `square` gives it: an encoded file, a Pillow image, or uint8 (C, H, W), (H, W, C) or (H, W)."""
    if isinstance(value, bytes | bytearray | memoryview):
        return decode(bytes(value), side, channels)
    if isinstance(value, Image.Image):
        return square(value, side, channels)
    array = np.asarray(value)
    if array.dtype != np.uint8:
        raise Unreadable(f"{array.dtype} pixels, whose range is not known")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise Unreadable(f"an array of shape {array.shape}, which is no image")
    return square(Image.fromarray(np.ascontiguousarray(array)), side, channels)


class LitData(ImageDataModule):
    """The images of a dataset that litdata.optimize wrote: items are dicts with an `image` (see `pixels`) and, if it is
    there, the number of its class in `label`; `classes` are their names, which shards don't tell.

    Training goes through the shards in a new order every epoch, a few at a time (see Batches). Validation images are those
    of `val`; without it `n_val` of the images of `train` are held out: the "last", so that shards stay whole, or "random"
    ones. Of URLs at most `local_cache` GB lie below `cache_dir` at a time.
    """

    def __init__(
        self,
        train: str | None,
        val: str | None = None,
        n_val: int = 1_000,
        held_out: str = "last",
        image: str = "image",
        label: str | None = "label",
        classes: Sequence[str] = (),
        local_cache: float = 50.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not train:
            raise InputError(
                "data=litdata needs the folder or URL of an optimized dataset; add data.train=<folder>"
            )
        self.train, self.val, self.n_val, self.held_out = train, val, n_val, held_out
        self.image, self.label, self.local_cache = image, label, local_cache
        self.title, self.classes = Path(train).name, list(classes)

    @cached_property
    def parts(self) -> dict[str, Source]:
        """Training and validation images."""
        whole = self._shards(self.train, "data.train")
        if self.val is None:
            rows, last = hold_out(len(whole), self.n_val, self.held_out, self.seed)
            return {"train": SourcePart(whole, rows), "val": SourcePart(whole, last)}
        held = self._shards(self.val, "data.val")
        if whole.key == held.key:
            raise InputError(
                f"data.train={self.train} and data.val={self.val} are the same images; use data.val=null"
            )
        return {"train": whole, "val": held}

    def _shards(self, root: str, setting: str) -> Shards:
        return Shards(root, setting, self.image, self.label, self.cache_dir, self.local_cache)

    def open(self, split: str) -> Source:
        return self.parts[split]
