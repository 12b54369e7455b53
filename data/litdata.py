"""Images in litdata shards, on a disk or in a bucket, for data that outgrows one disk or has too many files for a folder."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.arrays import choose_axes, take_values, to_plain_type
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.decode import PLAIN, UnreadableImage, decode, to_form
from codegrid.data.form import Form
from codegrid.data.labels import SORTED
from codegrid.data.order import BatchOrder
from codegrid.data.pixels import PixelRules
from codegrid.data.source import RawImage, Source, SourceSubset
from codegrid.data.store import fingerprint
from codegrid.data.tiff import PLAIN_CHANNELS
from codegrid.data.values import Values, values_to_pixels
from codegrid.engine.errors import InputError, summarize_error
from codegrid.engine.locks import Lock

GB = 10**9  # bytes
TEXT_KINDS = ("str", "text")  # what litdata calls text in an index


class ShardSource(Source):
    """The images of a dataset that litdata.optimize wrote, in the order of its shards.

    root          folder or URL (s3://, gs://, azure://, r2://)
    setting       the setting that gave root, for messages
    image, label  the keys of the image and of the label in an item, a class number or text; label may be None
    classes       the names of the classes in the order of their numbers, for labels of text
    cache_dir     folder below which the shards of a URL are stored
    local_cache   GB of shards that are stored there at a time; the least recently used shards are deleted first

    A shard of a URL is downloaded whole when one of its images is read, once for all processes of a machine. litdata caches
    shards only for its own order of images: if images are read by index, it downloads each one separately in every epoch.
    """

    checked_up_front = False
    use_threads = False  # a litdata reader holds one image at a time

    chunks: list[dict[str, Any]]  # the shards in index.json

    def __init__(
        self,
        root: str,
        setting: str,
        image: str,
        label: str | None,
        classes: Sequence[str],
        cache_dir: str,
        local_cache: float,
    ) -> None:
        try:
            import litdata  # noqa: F401
        except ImportError as error:
            raise InputError(
                'data=litdata needs the library litdata; pip install "codegrid[litdata]"'
            ) from error
        self.is_remote = "://" in root or root.startswith("local:")
        self.root = root if self.is_remote else str(Path(root).expanduser())
        self.image = image
        self.limit = local_cache * GB
        self.chunks = []
        text = self._read_index(setting)
        columns = self._parse_index(text, f"{setting}={root}")
        if image not in columns:
            raise InputError(
                f"{setting}={root} has no {image} in its items but {', '.join(columns) or 'no names'}; set data.image="
            )
        self.label = label if label in columns else None
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.item_keys = columns
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = Path(cache_dir, f"shards-{digest}") if self.is_remote else Path(self.root)
        if self.is_remote:
            self._check_local_cache()
            self._store_index(text)
        self._reader: tuple[int, Any] = (0, None)  # process id, reader
        key: dict[str, Any] = {"index": digest, "image": image, "label": self.label}
        if classes and self._kinds.get(self.label or "") in TEXT_KINDS:
            key["classes"] = list(classes)
        super().__init__(int(self.ends[-1]), key)
        # The index also has the time of writing. Images aren't read here, because each may lie in a shard to download.
        self.content_key = {**key, "shards": fingerprint(self.chunks)}
        del self.content_key["index"]

    def _store_index(self, text: str) -> None:
        """Put the index beside the shards that will be downloaded."""
        part = self.folder / f".index.json.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Other processes may be reading the index already, so it is replaced in one step.
            part.write_text(text)
            part.replace(self.folder / "index.json")
        except OSError as error:
            raise InputError(
                f"can't write the cache folder {self.folder} ({error.strerror or error}); name another with cache_dir=..."
            ) from error

    def _read_index(self, setting: str) -> str:
        if self.is_remote:
            with tempfile.TemporaryDirectory() as folder:
                self._download("index.json", Path(folder, "index.json"))
                return Path(folder, "index.json").read_text(errors="replace")
        file = Path(self.root, "index.json")
        if not file.is_file():
            raise InputError(
                f"{setting}={self.root} holds no index.json; give a folder that litdata.optimize wrote (docs/data.md)"
            )
        try:
            return file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file} can't be read ({summarize_error(error)}); check its rights, or write the shards anew"
            ) from error

    def _parse_index(self, text: str, where: str) -> list[str]:
        """Set `chunks`, `shard_sizes` and `ends` (index after the last image of each shard); returns the keys of an item."""
        try:
            index = json.loads(text)
            self.chunks, config = index["chunks"], index["config"]
            kind, formats = json.loads(config["data_spec"])[1], config["data_format"]
            columns = json.loads(kind["context"]) if kind["type"] == "builtins.dict" else []
            self.shard_sizes = [chunk["chunk_size"] for chunk in self.chunks]
            self.ends = np.cumsum(self.shard_sizes)
            int(self.ends[-1])
            is_packed = bool(config.get("compression") or config.get("encryption"))
            has_pickles = "pickle" in formats
            # Items that hold items have more formats than names.
            flat = len(formats) == len(columns)
            self._kinds = dict(zip(columns, map(str, formats), strict=True)) if flat else {}
        except Exception as error:  # any text may stand there
            raise InputError(
                f"{where} has an index.json that is not litdata's ({summarize_error(error)}); write it anew"
            ) from error
        if has_pickles:
            raise InputError(
                f"{where} holds pickled objects, which could run any code; write bytes, arrays and numbers"
            )
        if is_packed:
            raise InputError(
                f"{where} is compressed or encrypted; write it plain, encoded images don't get smaller"
            )
        return list(columns)

    def _download(self, name: str, file: Path) -> None:
        from litdata.streaming.downloader import get_downloader

        url = f"{self.root.rstrip('/')}/{name}"
        try:
            downloader = get_downloader(self.root, str(file.parent), self.chunks)
            downloader.download_file(url, str(file))
        except Exception as error:  # each kind of storage has a client with exceptions of its own
            raise InputError(
                f"{name} can't be fetched from {self.root} ({summarize_error(error)}); "
                "check the address, the network and your rights there"
            ) from error

    def _check_local_cache(self) -> None:
        """Raise InputError if the cache cannot hold the shards that are open and those that are opened next."""
        sizes = [chunk["chunk_bytes"] for chunk in self.chunks]
        least = min(sum(sizes), 2 * BatchOrder.OPEN_SHARDS * max(sizes))
        if self.limit < least:
            raise InputError(
                f"data.local_cache={self.limit / GB:g} GB is too small for these shards; use at least {least / GB:.3g}"
            )

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        chunk = self.chunks[int(np.searchsorted(self.ends, index, side="right"))]
        file = self.folder / Path(chunk["filename"]).name
        if self.is_remote:
            self._ensure_local(file, chunk["chunk_bytes"])
        try:
            item = self._open_reader()[index]
        except Exception as error:  # litdata has many decoders
            if not file.is_file() or file.stat().st_size < chunk["chunk_bytes"]:
                raise InputError(f"the shard {file} is missing or cut off; copy it anew") from error
            raise UnreadableImage(summarize_error(error)) from error
        label = -1 if self.label is None else self._parse_label(item[self.label])
        return to_pixels(item[self.image], form, self.rules), label

    def open_raw(self, index: int) -> RawImage | None:
        if self.is_remote:  # a whole shard would be downloaded for it
            return None
        value = self._open_reader()[index][self.image]
        if isinstance(value, bytes | bytearray | memoryview):
            return io.BytesIO(value)
        return value if isinstance(value, Image.Image) else np.asarray(value)

    def _parse_label(self, label: Any) -> int:
        text = label.strip() if isinstance(label, str) else None
        if text == "" or text in self.numbers:
            return self.numbers.get(text, -1)
        try:
            return int(label)
        except (
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
        ):  # torch's for a tensor of several
            if text is None:
                raise InputError(
                    f"data.label={self.label} must be the numbers of classes, or text, not {label!r}; use data.label=null"
                ) from None
        raise InputError(
            f"data.label={self.label} is text in {self.root}, and the class {text} is not in data.classes; shards don't say which "
            "classes there are, so list all of them in the order of their numbers, data.classes=[cats,dogs]"
        )

    def _open_reader(self) -> Any:
        """litdata's reader, one per process, because its memory map and position do not survive a fork."""
        from litdata import StreamingDataset

        pid, reader = self._reader
        if pid != os.getpid():
            # litdata keeps as many shards mapped as it may download ahead, and it never downloads from a folder.
            reader = StreamingDataset(str(self.folder), max_pre_download=BatchOrder.OPEN_SHARDS)
            self._reader = os.getpid(), reader
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": (0, None)}

    def _ensure_local(self, file: Path, size: int) -> None:
        """Download a shard unless it is in the local folder, and mark it as used now."""
        with suppress(FileNotFoundError):
            os.utime(file)
            return
        lock = Lock(file.with_name(f".{file.name}.lock"))
        with lock.wait(str(file), "name another folder with cache_dir=..."):
            if file.exists():  # another process was first
                return
            self._make_room(size)
            part = file.with_name(f".{file.name}.{os.getpid()}")
            self._download(file.name, part)
            if part.stat().st_size != size:
                part.unlink()
                raise InputError(
                    f"{self.root}/{file.name} is not as long as index.json says; was it written while we read?"
                )
            part.replace(file)

    def _make_room(self, size: int) -> None:
        """Delete the least recently used shards. A process that has one mapped can still read it."""
        shards: list[tuple[int, int, Path]] = []
        for file in self.folder.glob("*.bin"):
            with suppress(FileNotFoundError):  # other processes make room too
                shards.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        excess = size + sum(length for _, length, _ in shards) - self.limit
        for _, length, file in sorted(shards):
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= length


def to_pixels(value: Any, form: Form, rules: PixelRules = PLAIN) -> NDArray[Any]:
    """The image of an item as `to_form` returns it.

    The value is an encoded file, a Pillow image, or an array (C, H, W), (H, W, C) or (H, W) of numbers, which `rules` have a
    range for if they are not uint8. Raises UnreadableImage.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return decode(bytes(value), form, rules)
    if isinstance(value, Image.Image):
        return to_form(value, form, rules)
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise UnreadableImage(f"{array.dtype} pixels, which are no numbers")
    if form.channels not in PLAIN_CHANNELS:
        return values_to_pixels(
            take_values(array, choose_axes(array.shape, form.channels)), form, rules
        )
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UnreadableImage(f"an array of shape {array.shape}, which is no image")
    if array.dtype != np.uint8:
        last = array if array.ndim == 3 else array[:, :, None]
        return values_to_pixels(Values(to_plain_type(last), last.shape[2] == 4), form, rules)
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    return to_form(Image.fromarray(np.ascontiguousarray(array)), form, rules)


class LitData(ImageDataModule):
    """The images of a dataset that litdata.optimize wrote. Items are dicts with an image and perhaps a class number.

    train         folder or URL of the training images
    val           folder or URL of the validation images; None holds out `n_val` images of `train`
    n_val         number of images to hold out
    held_out      which ones: the "last", so that shards stay whole, or "random", by `split_seed` and their numbers
    image, label  keys of an item; see `to_pixels` for what an image may be; a label is a class number, or text if data.classes
                  lists the classes; label None: all labels are -1
    local_cache   GB of shards of a URL that are stored below `cache_dir` at a time

    Training goes through the shards in a new order every epoch, a few at a time (see BatchOrder).
    """

    place_settings = ("train", "val", "local_cache")

    def __init__(
        self,
        train: str | None,
        val: str | None,
        n_val: int,
        held_out: str,
        image: str,
        label: str | None,
        local_cache: float,
        **image_settings: Any,
    ) -> None:
        super().__init__(**image_settings)
        if not train:
            raise InputError(
                "data=litdata needs the folder or URL of an optimized dataset; add data.train=<folder>"
            )
        self.train = train
        self.val = val
        self.n_val = n_val
        self.held_out = held_out
        self.image = image
        self.label = label
        self.local_cache = local_cache
        self.title = Path(train).name

    @cached_property
    def splits(self) -> dict[str, Source]:
        """The training and the validation images."""
        whole = self._open_shards(self.train, "data.train")
        if self.val is None:
            rows, held_out = self.hold_out(whole.names(), self.n_val, self.held_out)
            return {"train": SourceSubset(whole, rows), "val": SourceSubset(whole, held_out)}
        val = self._open_shards(self.val, "data.val")
        if whole.key == val.key:
            raise InputError(
                f"data.train={self.train} and data.val={self.val} are the same images; use data.val=null"
            )
        return {"train": whole, "val": val}

    def _open_shards(self, root: str, setting: str) -> ShardSource:
        source = ShardSource(
            root,
            setting,
            self.image,
            self.label,
            self.classes,
            self.cache_dir,
            self.local_cache,
        )
        self._check_label(source, f"{setting}={root}")
        return source

    def _check_label(self, source: ShardSource, where: str) -> None:
        """Raise InputError if a command names a label that the items don't have.

        Runs of version 0.1 were trained without labels then, and still are. Items need not have the one that is called `label`
        by default.
        """
        if self.label == source.label:
            return
        choices = [name for name in source.item_keys if name != self.image]
        listed = ", ".join(choices) or "nothing beside the image"
        if self.label != "label" and self.class_setting != SORTED:
            raise InputError(
                f"data.label={self.label} is not in the items of {where}; there is {listed}; data.label=null leaves labels out"
            )
        if choices:
            self.label_remark = f"items have no {self.label}, so the images have no labels; data.label= names another of {listed}"

    def open_source(self, split: str) -> Source:
        return self.splits[split]
