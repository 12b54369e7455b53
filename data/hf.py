"""Any dataset that the library `datasets` opens: of the Hugging Face hub, or parquet, arrow, tar and image files."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.datamodule import ImageDataModule
from data.decode import Unreadable, decode
from data.loading import BatchOrder, count_cores
from data.source import Read, Source, SourcePart, hold_out
from engine.errors import InputError

OFFICIAL = (
    "validation",
    "valid",
    "val",
    "test",
)  # splits that are for validation, the first that exists
OPEN = 8  # shards of a stream that are read from at once; each may take the memory of a group of its rows
TOGETHER = 32  # rows of a stream that are unpacked at a time

Row = tuple[Any, Any]  # an undecoded image {"bytes", "path"} and a label


class HubTable(Source):
    """The rows of a dataset that lies on this disk: `image` names the column of undecoded images, `label` that of classes."""

    def __init__(self, rows: Any, image: str, label: str | None, key: Any) -> None:
        super().__init__(len(rows), key)
        self.rows, self.image, self.label = rows, image, label

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        row = self.rows[index]
        return decode(content(row[self.image]), side, channels), row_number(
            row[self.label] if self.label else None
        )

    def name(self, index: int) -> str:
        image = self.rows[index][self.image]
        return (image and image["path"]) or f"image {index}"


class HubStream(Source):
    """The first n rows of a dataset that is read from its beginning on and not kept; its columns are named as in Table.

    Images are numbered on an endless line: 0 to n - 1 are the split in its own order, and the e-th n after them are
    epoch e: its `parts` shards in a new order, some at once, and their images mixed in a buffer of `buffer`. Numbers that
    rise are read on. Any other is sought from the beginning of its epoch: all before it are read again, though not
    decoded, and so a resumed run starts as late as reading takes, with the very buffer that the killed one had.
    """

    checked = False
    parallel = False

    def __init__(
        self,
        rows: Any,
        parts: int,
        n: int,
        image: str,
        label: str | None,
        what: str,
        setting: str,
        buffer: int,
        seed: int,
        key: Any,
    ) -> None:
        super().__init__(n, key)
        self.rows, self.parts, self.image, self.label = rows, parts, image, label
        self.what, self.setting, self.buffer, self.seed = what, setting, buffer, seed
        self.shards = [n]
        self._close()

    def _close(self) -> None:
        self._pid, self._line, self._next = os.getpid(), -1, 0
        self._cursor: Iterator[Row] = iter(())
        self._pool: ThreadPoolExecutor | None = None

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        images, labels, faults = self.read([index], side, channels)
        if faults:
            raise Unreadable(faults[0])
        return images[0], int(labels[0])

    def name(self, index: int) -> str:
        epoch, place = divmod(index, self.n)
        return f"image {place} of {self.what}" + (f" in epoch {epoch - 1}" if epoch else "")

    def read(self, indices: Sequence[int], side: int, channels: int) -> Read:
        if self._pid != os.getpid():  # a fork has neither the threads nor the connections
            self._close()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(8, count_cores()))
        images, labels = (
            np.zeros((len(indices), channels, side, side), np.uint8),
            np.full(len(indices), -1),
        )
        faults: dict[int, str] = {}
        waiting: list[Future[NDArray[np.uint8]]] = []
        for place, index in enumerate(indices):  # the first are decoded while the next are read
            image, label = self._row(index)
            waiting.append(self._pool.submit(_decoded, image, side, channels))
            labels[place] = row_number(label)
        for place, result in enumerate(waiting):
            try:
                images[place] = result.result()
            except Unreadable as error:
                faults[place] = str(error)
        return images, labels, faults

    def _row(self, index: int) -> Row:
        line, place = divmod(index, self.n)
        if line != self._line or place < self._next:
            self._line, self._next = line, 0
            self._cursor = self._mixed(line) if line else self._read(self.rows)
        row: Row | None = None
        while self._next <= place:
            row = next(self._cursor, None)
            if row is None:
                end, self._line = self._next, -1
                raise InputError(
                    f"{self.what} ends after {end} images, not {self.n}; set {self.setting}={end}"
                )
            self._next += 1
        assert row is not None
        return row

    def _mixed(self, line: int) -> Iterator[Row]:
        """An epoch. Not the library's shuffle, whose order is another in a worker process, and which sleeps when it is left."""
        stream = np.random.default_rng((self.seed, line))
        buffer: list[Row] = []
        for row in self._interleaved(stream.permutation(self.parts).tolist()):
            buffer.append(row)
            if len(buffer) >= self.buffer:
                at = stream.integers(len(buffer))
                buffer[at], buffer[-1] = buffer[-1], buffer[at]
                yield buffer.pop()
        yield from (buffer[i] for i in stream.permutation(len(buffer)))

    def _interleaved(self, parts: list[int]) -> Iterator[Row]:
        """A row of each of OPEN shards in turn; the next shard follows where one ends."""
        shards = (
            self._read(self.rows.shard(self.parts, part) if self.parts > 1 else self.rows)
            for part in parts
        )
        opened = deque(islice(shards, OPEN))
        while opened:
            row = next(opened[0], None)
            if row is None:
                opened.popleft()
                opened.extend(islice(shards, 1))
            else:
                yield row
                opened.rotate(-1)

    def _read(self, rows: Any) -> Iterator[Row]:
        for some in rows.iter(batch_size=TOGETHER):  # iter(rows) would be a worker's share alone
            images = some[self.image]
            yield from zip(
                images, some[self.label] if self.label else [None] * len(images), strict=True
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pid": -1, "_cursor": None, "_pool": None}


class Onwards(BatchOrder):
    """Batches of a Stream, whose epochs come shuffled: its numbers just rise."""

    def order(self, epoch: int) -> NDArray[np.int64]:
        return (epoch + 1) * self.n + np.arange(self.n)


def _decoded(image: Any, side: int, channels: int) -> NDArray[np.uint8]:
    return decode(content(image), side, channels)


def content(image: Any) -> bytes:
    """The bytes of an undecoded image {"bytes", "path"}, which has one or the other."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise Unreadable("there is none")
    if image["bytes"] is not None:
        found: bytes = image["bytes"]
        return found
    import fsspec

    try:
        with fsspec.open(image["path"], "rb") as file:
            read: bytes = file.read()
            return read
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def row_number(label: Any) -> int:
    """A class's number; -1 where there is none."""
    return -1 if label is None else int(label)


class HF(ImageDataModule):
    """A dataset of the hub by its name, or files by their kind: path=parquet, webdataset (tar), arrow, imagefolder, with
    `files`, which may name those of each split. Code of a dataset's own is never run.

    Training images are those of the split `train`. Validation images are those of `val`, by default of the dataset's own
    validation or else test split; where there is none `n_val` images are held out: "random" ones or the "last", of a
    stream the first. `image` and `label` name the columns; a label is a class's number, -1 where there is no such column.

    With `streaming` nothing is kept on disk and each image is decoded each time, whatever `cache` says (see Stream). One
    process reads at most, and on several devices each reads it all and decodes its share. Without shards to shuffle, as
    after holding images out, the buffer alone mixes. `n_train` is how many images an epoch has, needed where the dataset
    doesn't say.
    """

    def __init__(
        self,
        path: str | None,
        name: str | None = None,
        files: Any = None,
        revision: str | None = None,
        train: str = "train",
        val: str | None = None,
        n_val: int = 1_000,
        held_out: str = "random",
        image: str = "image",
        label: str | None = "label",
        streaming: bool = False,
        buffer: int = 1_000,
        n_train: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**({**settings, "cache": "none"} if streaming else settings))
        if not path:
            raise InputError(
                "data=hf needs a dataset of the hub or a kind of files; add data.path=<name> or data.path=parquet"
            )
        if train == val:
            raise InputError(
                f"data.train={train} and data.val={val} are the same split; use data.val=null to hold images out"
            )
        if buffer < 1:
            raise InputError(f"data.buffer={buffer} must be at least 1 image")
        if streaming:
            self.num_workers, self.batches = min(1, self.num_workers), Onwards
        self.path, self.configuration, self.files, self.revision = path, name, files, revision
        self.train, self.val, self.n_val, self.held_out = train, val, n_val, held_out
        self.image, self.label = image, label
        self.streaming, self.buffer, self.n_train = streaming, buffer, n_train
        self.title = Path(path).name

    @cached_property
    def builder(self) -> Any:
        """What knows the dataset's files and prepares them."""
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                'data=hf needs the library datasets; pip install "codegrid[hf]"'
            ) from error
        with self._explained():
            return datasets.load_dataset_builder(
                self.path, self.configuration, data_files=self.files, revision=self.revision
            )

    @cached_property
    def found(self) -> Mapping[str, Any]:
        """The dataset's splits by their names."""
        builder = self.builder
        with self._explained():
            if self.streaming:
                splits: Mapping[str, Any] = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                splits = builder.as_dataset()
        return splits

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from datasets.exceptions import DatasetsError

        try:
            yield
        except (OSError, ValueError, DatasetsError) as error:
            which = f"data.path={self.path}" + "".join(
                f" data.{setting}={value}"
                for setting, value in (
                    ("name", self.configuration),
                    ("files", self.files),
                    ("revision", self.revision),
                )
                if value
            )
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise InputError(
                f"{which} can't be opened ({reason}); check the name, the files and the network"
            ) from error

    def open(self, split: str) -> Source:
        val = self.val or next(
            (name for name in OFFICIAL if name in self.found and name != self.train), None
        )
        name = val if val and split == "val" else self.train
        for setting, chosen in (("train", self.train), ("val", val or self.train)):
            if chosen not in self.found:
                raise InputError(
                    f"data.{setting}={chosen} is not a split of {self.path}; there is {', '.join(self.found)}"
                )
        rows, label = self._columns(self.found[name])
        key = {
            "dataset": self.builder.config_id,
            "code": self.builder.hash,
            "split": name,
            "columns": [self.image, label],
        }
        if self.streaming:
            return self._stream(rows, label, split, name, val is None, key)
        whole = HubTable(rows, self.image, label, key)
        if val:
            return whole
        rest, held = hold_out(len(whole), self.n_val, self.held_out, self.seed)
        return SourcePart(whole, rest if split == "train" else held)

    def _stream(
        self, rows: Any, label: str | None, split: str, name: str, hold: bool, key: dict[str, Any]
    ) -> HubStream:
        told = self.builder.info.splits or {}
        n: int | None = (told[name].num_examples or None) if name in told else None
        if hold:
            if self.n_val < 1 or (n and self.n_val >= n):
                raise InputError(
                    f"data.n_val={self.n_val} must leave both splits an image; there are {n or 'some'}"
                )
            rows = rows.skip(self.n_val) if split == "train" else rows.take(self.n_val)
            n = self.n_val if split == "val" else n and n - self.n_val
        n = (self.n_train or n) if split == "train" else (n or self.n_val)
        if not n:
            raise InputError(
                f"data.path={self.path} does not say how many images {name} has; set data.n_train="
            )
        key |= {"n": n, "held": hold and self.n_val}
        what, setting = f"data.path={self.path} {name}", f"data.n_{split}"
        parts = (
            1 if hold else rows.num_shards
        )  # what is held out is part of a shard, and the library would share it among all
        return HubStream(
            rows, parts, n, self.image, label, what, setting, self.buffer, self.seed, key
        )

    def _columns(self, rows: Any) -> tuple[Any, str | None]:
        """The columns that are asked for alone, the images not decoded, and the name of that of labels, if it is there."""
        from datasets import ClassLabel, Image

        features = rows.features
        if features is None:
            raise InputError(
                f"data.path={self.path} does not say which columns it has; use data.streaming=false"
            )
        if self.image not in features:
            hint = next(
                (
                    f"; set data.image={name}"
                    for name, feature in features.items()
                    if isinstance(feature, Image)
                ),
                "",
            )
            raise InputError(
                f"data.image={self.image} is not a column of {self.path}; there is {', '.join(features)}{hint}"
            )
        kind = features[self.image]
        if not isinstance(kind, Image) and getattr(kind, "dtype", "").removeprefix(
            "large_"
        ) not in ("binary", "string"):
            raise InputError(
                f"data.image={self.image} is a column of {kind}, not of images; there is {', '.join(features)}"
            )
        label = self.label if self.label in features else None
        if label is not None:
            kind = features[label]
            if isinstance(kind, ClassLabel):
                self.classes = list(kind.names)
            elif not getattr(kind, "dtype", "").startswith(("int", "uint", "bool")):
                raise InputError(
                    f"data.label={label} is a column of {kind}, not of class numbers; use data.label=null"
                )
        columns = [self.image] if label is None else [self.image, label]
        return rows.select_columns(columns).cast_column(self.image, Image(decode=False)), label
