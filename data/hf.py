"""Any dataset that the library `datasets` opens: from the Hugging Face hub, or parquet, arrow, tar and image files."""

import errno
import io
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.decode import UnreadableImage, decode
from codegrid.data.form import Form
from codegrid.data.labelling import Labelling, convert_recorded, describe_columns
from codegrid.data.labels import SORTED, number_label, order_names
from codegrid.data.loading import count_cores
from codegrid.data.order import BatchOrder
from codegrid.data.pixels import PixelRules
from codegrid.data.source import ImageBatch, Source, SourceSubset, hash_columns
from codegrid.data.split import Names
from codegrid.data.store import fingerprint
from codegrid.data.tables import Column, ColumnValues, read_arrow, refuse_column, split_kind
from codegrid.engine.errors import InputError, summarize_error

# Names of validation splits; the first one that a dataset has is used.
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
OPEN_STREAM_SHARDS = (
    8  # shards of a stream that are read in turn; each may take the memory of a row group
)
DEFAULT_LABEL = "label"  # a column that need not be there: that of conf/data
ROWS_PER_READ = 32  # rows of a stream that are unpacked at a time
SURVEYED_ROWS = 32  # rows of a stream that its summary looks at

# The hub makes a copy of most datasets that needs no program, under this revision.
PARQUET_COPY = "refs/convert/parquet"
NO_ROOM = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

Row = tuple[Any, Any]  # an undecoded image {"bytes", "path"} and a label


class HubTable(Source):
    """The rows of a dataset on this disk. `image` names the column of undecoded images, `label` the column of class numbers.

    numbers   the class of each value of the column; a number that it lacks is the class itself
    root      the folder of the dataset, if it lies in one
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str | None,
        key: Any,
        numbers: Mapping[Any, int],
        root: str = "",
        columns: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        # Cached labels are those of these numbers.
        super().__init__(
            len(rows), {**key, "numbers": fingerprint([*numbers.items()])} if numbers else key
        )
        self.root = f"{Path(root).resolve().as_posix()}/" if root else ""
        self.content_key = {"columns": key["columns"]}
        if columns:
            self.columns = columns
            self.label_key = fingerprint(hash_columns(columns))
            self.content_key["table"] = self.label_key
        self.numbers = numbers
        self.rows = rows
        self.image = image
        self.label = label

    def raw_content(self, index: int) -> bytes | None:
        """The label and the undecoded image; no image where there is none to read."""
        row = self.rows[index]
        value = row[self.label] if self.label else None
        label = (value if isinstance(value, str) else str(class_number(value))).encode()
        try:
            return label + b" " + read_content(row[self.image])
        except UnreadableImage:
            return label

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        row = self.read_row(index)
        label = row[self.label] if self.label else None
        number = number_label(label, self.numbers, f"data.label={self.label}")
        return decode(read_content(row[self.image]), form, self.rules), number

    def open_raw(self, index: int) -> IO[bytes]:
        return io.BytesIO(read_content(self.rows[index][self.image]))

    def read_row(self, index: int) -> Mapping[str, Any]:
        """A row of the table. Raises UnreadableImage if its file is damaged."""
        try:
            row: Mapping[str, Any] = self.rows[index]
        except Exception as error:  # of pyarrow, and of the disk
            raise UnreadableImage(summarize_error(error)) from error
        return row

    def image_name(self, index: int) -> str:
        image = None
        with suppress(UnreadableImage):
            image = self.read_row(index)[self.image]
        return (image and image["path"]) or f"image {index}"

    def names(self) -> Names:
        """The paths that the dataset has for its images, below `root` or else the folder that they share; their numbers if it
        has none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.rows.data.column(self.image)
        if not pa.types.is_struct(column.type) or self.rows._indices is not None:
            return range(self.n)
        # Only the paths are read, not the images beside them.
        paths = pc.struct_field(column, "path").to_pylist()
        if None in paths or len(set(paths)) < len(paths):
            return range(self.n)
        # Not commonpath, which would turn hf:// into hf:/.
        shared = os.path.commonprefix(paths)  # noqa: RUF071
        if self.root and shared.startswith(self.root):
            shared = self.root
        begin = len(shared[: shared.rfind("/") + 1])
        return [path[begin:] for path in paths]


class HubStream(Source):
    """The first n rows of a dataset that is read sequentially and not stored.

    Indices form an endless line: 0 to n - 1 are the split in its own order, and the e-th n after them are epoch e, with its
    `num_shards` shards in a new order, several of them read in turn, and their images mixed in a buffer of `buffer` rows.
    Rising indices continue to read. Any other index is reached from the beginning of its epoch: all rows before it are read
    again, though not decoded. A resumed run therefore starts late, but with the very buffer that the killed run had.

    rows           the streaming dataset
    image, label   its columns, as in HubTable
    numbers        the class of each text of the label column, if it holds text
    what, setting  the name of the split and the setting of its size, for messages
    """

    checked_up_front = False
    use_threads = False
    starts_late = True

    def __init__(
        self,
        rows: Any,
        num_shards: int,
        n: int,
        image: str,
        label: str | None,
        numbers: Mapping[Any, int],
        what: str,
        setting: str,
        buffer: int,
        seed: int,
        key: Any,
    ) -> None:
        super().__init__(n, key)
        # Its images are not read here, because the first of a remote file may take as long as a thousand.
        same = ("split", "columns", "n", "held")
        self.content_key = {name: key[name] for name in same} | {"shards": num_shards}
        self.numbers = numbers
        self.rows = rows
        self.num_shards = num_shards
        self.image = image
        self.label = label
        self.what = what
        self.setting = setting
        self.buffer = buffer
        self.seed = seed
        self.shard_sizes = [n]
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._epoch = -1  # of the cursor; 0 is the split in its own order
        self._next = 0  # place of the row that the cursor gives next
        self._cursor: Iterator[Row] = iter(())
        self._first_rows: list[Row] = []
        self._pool: ThreadPoolExecutor | None = None

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        images, labels, faults = self.read_batch([index], form)
        if faults:
            raise UnreadableImage(faults[0])
        return images[0], int(labels[0])

    def image_name(self, index: int) -> str:
        epoch, place = divmod(index, self.n)
        return f"image {place} of {self.what}" + (f" in epoch {epoch - 1}" if epoch else "")

    def pick_rows(self, most: int) -> list[int]:
        return list(range(min(self.n, most, SURVEYED_ROWS)))

    def open_raw(self, index: int) -> IO[bytes] | None:
        """One of the first rows of the stream, which are read together."""
        if not self._first_rows:
            self._first_rows = list(islice(self._iterate_rows(self.rows), SURVEYED_ROWS))
        return io.BytesIO(read_content(self._first_rows[index][0]))

    def read_batch(self, indices: Sequence[int], form: Form) -> ImageBatch:
        if self._pid != os.getpid():  # threads and connections do not survive a fork
            self._reset()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(8, count_cores()))
        images = np.zeros((len(indices), *form.shape), self.rules.dtype)
        labels = np.full(len(indices), -1)
        faults: dict[int, str] = {}
        decoding: list[Future[NDArray[Any]]] = []
        for place, index in enumerate(indices):  # threads decode rows while later rows are read
            image, label = self._read_row(index)
            decoding.append(self._pool.submit(_decode_row, image, form, self.rules))
            labels[place] = number_label(label, self.numbers, self.what)
        for place, future in enumerate(decoding):
            try:
                images[place] = future.result()
            except UnreadableImage as error:
                faults[place] = str(error)
        return images, labels, faults

    def _read_row(self, index: int) -> Row:
        epoch, place = divmod(index, self.n)
        if epoch != self._epoch or place < self._next:
            self._epoch, self._next = epoch, 0
            self._cursor = self._mix_epoch(epoch) if epoch else self._iterate_rows(self.rows)
        row: Row | None = None
        while self._next <= place:
            row = next(self._cursor, None)
            if row is None:
                end, self._epoch = self._next, -1
                raise InputError(
                    f"{self.what} ends after {end} images, not {self.n}; set {self.setting}={end}"
                )
            self._next += 1
        assert row is not None
        return row

    def _mix_epoch(self, epoch: int) -> Iterator[Row]:
        """The rows of an epoch in training order.

        This does not use the library's shuffle, which gives another order in a worker process and sleeps when it is closed.
        """
        generator = np.random.default_rng((self.seed, epoch))
        buffer: list[Row] = []
        for row in self._interleave(generator.permutation(self.num_shards).tolist()):
            buffer.append(row)
            if len(buffer) >= self.buffer:
                i = generator.integers(len(buffer))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                yield buffer.pop()
        yield from (buffer[i] for i in generator.permutation(len(buffer)))

    def _interleave(self, order: list[int]) -> Iterator[Row]:
        """One row from each of OPEN_STREAM_SHARDS shards in turn; when a shard ends, the next one is opened."""
        shards = (
            self._iterate_rows(
                self.rows.shard(self.num_shards, i) if self.num_shards > 1 else self.rows
            )
            for i in order
        )
        opened = deque(islice(shards, OPEN_STREAM_SHARDS))
        while opened:
            row = next(opened[0], None)
            if row is None:
                opened.popleft()
                opened.extend(islice(shards, 1))
            else:
                yield row
                opened.rotate(-1)

    def _iterate_rows(self, rows: Any) -> Iterator[Row]:
        # iter(rows) would give a worker process only its own share.
        batches = rows.iter(batch_size=ROWS_PER_READ)
        while batch := self._read_next(batches):
            images = batch[self.image]
            labels = batch[self.label] if self.label else [None] * len(images)
            yield from zip(images, labels, strict=True)

    def _read_next(self, batches: Iterator[Any]) -> Any:
        """The next rows by column, None at the end. Raises InputError if they can't be read."""
        try:
            return next(batches, None)
        except Exception as error:  # of the network, and of readers of each kind of files
            raise InputError(
                f"{self.what} can't be read any further ({summarize_error(error)}); check its files and the network"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pid": -1, "_cursor": None, "_pool": None, "_first_rows": []}


class StreamOrder(BatchOrder):
    """Batches of a HubStream, which shuffles its epochs itself, so the indices just rise."""

    def permute_epoch(self, epoch: int) -> NDArray[np.int64]:
        return (epoch + 1) * self.n + np.arange(self.n)


def _decode_row(image: Any, form: Form, rules: PixelRules) -> NDArray[Any]:
    return decode(read_content(image), form, rules)


def read_content(image: Any) -> bytes:
    """The bytes of an undecoded image {"bytes", "path"}, which has one or the other. Raises UnreadableImage."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise UnreadableImage("there is none")
    content: bytes
    if image["bytes"] is not None:
        content = image["bytes"]
        return content
    import fsspec

    try:
        with fsspec.open(image["path"], "rb") as file:
            content = file.read()
            return content
    except Exception as error:  # each kind of storage has a client with exceptions of its own
        raise UnreadableImage(summarize_error(error)) from error


def find_root(path: str, files: Any) -> str:
    """The folder of a dataset on this disk: `path` itself, or that of a pattern of files; empty if there is none to name."""
    if Path(path).is_dir():
        return path
    if not isinstance(files, str) or "://" in files:
        return ""
    parts = Path(files).parent.parts
    return str(Path(*takewhile(lambda part: not set(part) & set("*?["), parts)))


def read_hub_columns(
    splits: Mapping[str, Any], names: Sequence[str], settings: Labelling, path: str
) -> dict[str, dict[str, Column]]:
    """The further columns of these splits of a dataset, by the names of the splits. Raises InputError if one is not there."""
    columns: dict[str, dict[str, Column]] = {split: {} for split in names}
    for entry in settings.columns:
        name = split_kind(entry)[0]
        for split in names:
            features = list(splits[split].features)
            if name not in features:
                raise refuse_column("data.columns", name, f"{path} {split}", features)
        parts = [read_hub_column(splits[split], name, f"{name} of {path}") for split in names]
        converted = convert_recorded(parts, entry, f"{name} of {path}", settings)
        for split, column in zip(names, converted, strict=True):
            columns[split][name] = column
    return columns


def read_hub_column(rows: Any, name: str, what: str) -> ColumnValues:
    """The values of a column; the names of those that are classes."""
    from datasets import ClassLabel

    values = read_arrow(rows.select_columns([name]).with_format("arrow")[:].column(name), what)
    feature = rows.features[name]
    if not isinstance(feature, ClassLabel) or not isinstance(values, list):
        return values
    return [feature.int2str(int(value)) if value and int(value) >= 0 else "" for value in values]


def class_number(label: Any) -> int:
    """The number of a class, -1 for None."""
    return -1 if label is None else int(label)


class HF(ImageDataModule):
    """A dataset of the Hugging Face hub, or files that the library `datasets` reads. Code of a dataset is never run.

    path          name of the dataset, a folder, or a kind of files: parquet, webdataset (tar), arrow, imagefolder
    name          configuration of the dataset, if it has several
    files         files of such a kind, which may be named for each split
    revision      commit or tag on the hub
    train         split of the training images
    val           split of the validation images; None stands for the dataset's own validation or else test split, and if
                  there is none, `n_val` images are held out
    n_val         number of images to hold out
    held_out      which ones: "random", by `split_seed` and the images' paths, or their numbers if they have none, or the
                  "last"; of a stream always the first
    image, label  columns; a label is a class number or text, -1 if there is no such column
    columns       further columns that stay with the images (see Labelling)
    streaming     nothing is stored on disk, and each image is decoded on each access, whatever `cache` says (see HubStream)
    buffer        rows of a stream that are mixed in memory
    n_train       number of images in an epoch of a stream, needed if the dataset does not say

    A stream is read by at most one process; on several devices each reads everything and decodes its share. If there are no
    shards to shuffle, for example after holding images out, only the buffer mixes.
    """

    place_settings = ("path", "files")
    label_settings = ("columns", "column_names")

    def __init__(
        self,
        path: str | None,
        name: str | None,
        files: Any,
        revision: str | None,
        train: str,
        val: str | None,
        n_val: int,
        held_out: str,
        image: str,
        label: str | None,
        streaming: bool,
        buffer: int,
        n_train: int | None,
        **image_settings: Any,
    ) -> None:
        super().__init__(**(image_settings | ({"cache": "none"} if streaming else {})))
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
        if streaming and self.labelling.columns:
            raise InputError(
                f"data.columns=[{','.join(self.labelling.columns)}] needs data.streaming=false, which reads them before training"
            )
        if streaming:
            self.num_workers = min(1, self.num_workers)
            self.batch_order = StreamOrder
        self.path = path
        self.configuration = name
        self.files = files
        self.revision = revision
        self.train = train
        self.val = val
        self.n_val = n_val
        self.held_out = held_out
        self.image = image
        self.label = label
        self.streaming = self.is_stream = streaming
        self.buffer = buffer
        self.n_train = n_train
        self.title = Path(path).name

    @cached_property
    def builder(self) -> Any:
        """The library's object that knows the files of the dataset and prepares them."""
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                'data=hf needs the library datasets; pip install "codegrid[hf]"'
            ) from error
        with self._explain_errors():
            return datasets.load_dataset_builder(
                self.path, self.configuration, data_files=self.files, revision=self.revision
            )

    @cached_property
    def splits(self) -> Mapping[str, Any]:
        """The splits of the dataset by their names."""
        builder = self.builder
        with self._explain_errors():
            if self.streaming:
                splits: Mapping[str, Any] = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                splits = builder.as_dataset()
        return splits

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn errors of opening the dataset into InputError."""
        try:
            yield
        except (
            Exception
        ) as error:  # of readers of a dozen kinds of files, their libraries, and storage
            settings = {
                "path": self.path,
                "name": self.configuration,
                "files": self.files,
                "revision": self.revision,
            }
            words = " ".join(f"data.{name}={value}" for name, value in settings.items() if value)
            raise InputError(self._explain(words, error)) from error

    def _explain(self, words: str, error: Exception) -> str:
        """The sentence about a dataset that can't be opened; `words` are the settings that name it."""
        from datasets.exceptions import DatasetsError

        cause = error.__cause__ if isinstance(error, DatasetsError) else None  # says more
        reason = summarize_error(cause or error)
        if "scripts are no longer supported" in reason:
            on_hub = not Path(str(self.path)).exists() and self.revision != PARQUET_COPY
            copy = f"read its copy on the hub with data.revision={PARQUET_COPY}, or " * on_hub
            return (
                f"{words} has a loading script, a program, which is never run ({reason}); {copy}"
                "name the files themselves, as data.path=parquet data.files=<files>"
            )
        way_out = "check the name, the files and the network"
        if isinstance(error, ImportError):
            way_out = "install what it asks for, or name files of another kind"
        elif isinstance(error, OSError) and error.errno in NO_ROOM:
            way_out = "check the rights and the room for its files and its cache, which HF_HOME=<folder> moves"
        return f"{words} can't be opened ({reason}); {way_out}"

    def open_source(self, split: str) -> Source:
        official = [
            name for name in VALIDATION_SPLITS if name in self.splits and name != self.train
        ]
        val = self.val or (official[0] if official else None)
        for setting, chosen in (("train", self.train), ("val", val or self.train)):
            if chosen not in self.splits:
                raise InputError(
                    f"data.{setting}={chosen} is not a split of {self.path}; there is {', '.join(self.splits)}"
                )
        name = val if val and split == "val" else self.train
        rows, label = self._select_columns(self.splits[name])
        key = {
            "dataset": self.builder.config_id,
            "code": self.builder.hash,
            "split": name,
            "columns": [self.image, label],
        }
        if self.streaming:
            return self._open_stream(rows, label, split, name, val is None, key)
        both = list(dict.fromkeys([self.train, val or self.train]))
        numbers = self._number_labels(label, both)
        columns = read_hub_columns(self.splits, both, self.labelling, self.path)
        self.column_names = {
            column: list(each.names)
            for column, each in columns[self.train].items()
            if each.names is not None
        }
        self.label_summary = describe_columns(columns[self.train])
        root = find_root(self.path, self.files)
        values = {column: each.values for column, each in columns[name].items()}
        whole = HubTable(rows, self.image, label, key, numbers, root, values)
        if val:
            return whole
        names = range(len(whole)) if self.held_out == "last" else whole.names()
        train_rows, val_rows = self.hold_out(names, self.n_val, self.held_out)
        return SourceSubset(whole, train_rows if split == "train" else val_rows)

    def _open_stream(
        self,
        rows: Any,
        label: str | None,
        split: str,
        name: str,
        is_held_out: bool,
        key: dict[str, Any],
    ) -> HubStream:
        """The stream of a split, read from the dataset's split `name`; `is_held_out` if both come from the same one."""
        known = self.builder.info.splits or {}
        n: int | None = (known[name].num_examples or None) if name in known else None
        if is_held_out:
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
        key |= {"n": n, "held": is_held_out and self.n_val}
        numbers = self._number_listed_text()
        if numbers:
            key["numbers"] = fingerprint([*numbers.items()])
        # The library would divide the number of skipped or taken rows among all shards.
        num_shards = 1 if is_held_out else rows.num_shards
        what, setting = f"data.path={self.path} {name}", f"data.n_{split}"
        return HubStream(
            rows,
            num_shards,
            n,
            self.image,
            label,
            numbers,
            what,
            setting,
            self.buffer,
            self.seed,
            key,
        )

    def _number_listed_text(self) -> dict[Any, int]:
        """The class of each text of a stream's label column, by data.classes; empty if it has numbers. Raises InputError if
        data.classes lists none."""
        if not self.has_text:
            return {}
        if not isinstance(self.class_setting, list):
            raise InputError(
                f"data.label={self.label} is text, and a stream doesn't say before it is read which classes there are; list "
                "them in the order of their numbers with data.classes=[cats,dogs], or use data.streaming=false"
            )
        return {name: number for number, name in enumerate(self.class_setting)}

    def _select_columns(self, rows: Any) -> tuple[Any, str | None]:
        """The rows with undecoded images and labels only, and the name of the label column, None if there is none."""
        from datasets import Image

        features = rows.features
        if features is None:
            raise InputError(
                f"data.path={self.path} does not say which columns it has; use data.streaming=false"
            )
        self._check_image_column(features)
        label = self._check_label_column(features)
        if label is not None:
            self._read_classes(features[label])
        columns = [self.image] if label is None else [self.image, label]
        return rows.select_columns(columns).cast_column(self.image, Image(decode=False)), label

    def _check_image_column(self, features: Any) -> None:
        """Raise InputError unless `image` is a column of images."""
        from datasets import Image

        if self.image not in features:
            images = [name for name, feature in features.items() if isinstance(feature, Image)]
            hint = f"; set data.image={images[0]}" if images else ""
            raise InputError(
                f"data.image={self.image} is not a column of {self.path}; there is {', '.join(features)}{hint}"
            )
        feature = features[self.image]
        dtype = getattr(feature, "dtype", "").removeprefix("large_")
        if not isinstance(feature, Image) and dtype not in ("binary", "string"):
            raise InputError(
                f"data.image={self.image} is a column of {feature}, not of images; there is {', '.join(features)}"
            )

    def _check_label_column(self, features: Any) -> str | None:
        """The label column, None if there is none. Raises InputError for one that a command names and that isn't there.

        Runs of version 0.1 were trained without labels then, and still are. A dataset need not have the column that is
        called `label` by default.
        """
        if self.label is None or self.label in features:
            return self.label
        choices = [name for name in features if name != self.image]
        listed = ", ".join(choices) or "no other column than the images"
        if self.label == DEFAULT_LABEL or self.class_setting == SORTED:
            if choices:
                self.label_remark = (
                    f"there is no column {self.label}, so the images have no labels; "
                    f"data.label= names another of {listed}"
                )
            return None
        raise InputError(
            f"data.label={self.label} is not a column of {self.path}; there is {listed}; "
            "data.label=null leaves labels out"
        )

    def _number_labels(self, label: str | None, splits: Sequence[str]) -> dict[Any, int]:
        """The class of each value of a column of text, or of class numbers without names; empty if each is its own.

        Values with holes between them, such as ids, are numbered densely, in their order, and called by the value. A value
        that data.classes lacks follows those that it has.
        """
        if label is None or self.has_names:
            return {}
        if self.class_setting == SORTED and not self.has_text:
            return {}
        values = {value for split in splits for value in self.splits[split].unique(label)}
        if self.has_text:
            texts = {value.strip() for value in values if value is not None} - {""}
            self.classes = order_names(texts, self.class_setting)
            return {name: place for place, name in enumerate(self.classes)}
        values = {int(value) for value in values if value is not None and value >= 0}
        self.classes = order_names(map(str, values), self.class_setting)
        places = {int(name): place for place, name in enumerate(self.classes)}
        return {} if all(value == place for value, place in places.items()) else places

    has_names = False  # whether the label column names its classes
    has_text = False  # whether it holds text

    def _read_classes(self, feature: Any) -> None:
        """Set the class names that a label column has. Raises InputError if it holds neither class numbers nor text."""
        from datasets import ClassLabel

        dtype = getattr(feature, "dtype", "")
        self.has_text = dtype in ("string", "large_string", "string_view")
        if isinstance(feature, ClassLabel):
            self.has_names = True
            if not isinstance(self.class_setting, list):
                self.classes = list(feature.names)
        elif not self.has_text and not dtype.startswith(("int", "uint", "bool")):
            raise InputError(
                f"data.label={self.label} is a column of {feature}, not of class numbers or text; use data.label=null"
            )
