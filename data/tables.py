"""Tables with a row for each image, in CSV, TSV and parquet files, and what becomes of their columns."""

import csv
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.labels import order_names
from codegrid.engine.errors import InputError, suggest, summarize_error

DELIMITERS = {".csv": ",;\t", ".txt": ",;\t", ".tsv": "\t", ".tab": "\t"}
PARQUET = (".parquet", ".pq")
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # of encodings
LONG_NUMBER = 8  # digits, from which on 32 bits may not hold a number
AS_TEXT = ":text"  # after the name of a column in data.columns: its numbers are names

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)", re.IGNORECASE)
WHOLE_NUMBER = re.compile(r"[-+]?\d+")
WHOLE_WITH_POINT = re.compile(r"(-?\d+)\.0+")
LEADING_ZERO = re.compile(r"[-+]?0\d")

# The texts of a column, empty where a row has none, or its vectors (n, size), not a number where a row has none.
ColumnValues = list[str] | NDArray[np.float64]


class Table(ABC):
    """The columns of a file by their names.

    setting   what names the file in messages, as in data.labels=labels.csv
    columns   the names of its columns, in their order
    """

    columns: list[str]

    def __init__(self, file: Path, setting: str) -> None:
        self.file = file
        self.setting = setting

    @abstractmethod
    def read(self, names: Sequence[str], most: int | None = None) -> list[ColumnValues]:
        """The values of these columns, in all rows or in `most` of them at the beginning."""

    @abstractmethod
    def name_row(self, row: int) -> str:
        """A row in messages, counted as the program that shows the table counts it."""

    @property
    def naming_columns(self) -> list[str]:
        """The columns that may name files."""
        return self.columns

    def check_column(self, key: str, name: str) -> None:
        """Raise InputError unless the table has one column of this name; `key` is the setting that names it."""
        if (n := self.columns.count(name)) == 1:
            return
        if n > 1:
            raise InputError(
                f"{self.setting} has {n} columns {name}, and {key}={name} means one; give each a name of its own"
            )
        raise refuse_column(key, name, str(self.file), self.columns)


def refuse_column(key: str, name: str, where: str, columns: list[str]) -> InputError:
    """The sentence about a column that is not there; `key` is the setting that names it."""
    question = suggest(name, columns)
    return InputError(
        f"{key}={name} is not a column of {where}{question or ';'} there is {list_columns(columns)}"
    )


def list_columns(names: Sequence[str], n: int = 10) -> str:
    """The first names of columns, and how many more there are."""
    more = f" and {len(names) - n:,} more" if len(names) > n else ""
    return ", ".join(name or "(no name)" for name in names[:n]) + more


class TextTable(Table):
    """A CSV or TSV file, whose first line names the columns.

    `needed` are columns that settings name: of the delimiters that a .csv may have, the first is used by which the first line
    has them all, or else the one that divides it most.
    """

    def __init__(self, file: Path, setting: str, needed: Sequence[str]) -> None:
        super().__init__(file, setting)
        with self._explain_errors(), file.open("rb") as opened:
            beginning = opened.read(3)
        marks = (name for mark, name in MARKS.items() if beginning.startswith(mark))
        self.encoding = next(marks, "utf-8")
        headers = {mark: self._read_header(mark) for mark in DELIMITERS[file.suffix.lower()]}
        complete = (mark for mark, names in headers.items() if set(needed) <= set(names))
        self.delimiter = next(complete, max(headers, key=lambda mark: len(headers[mark])))
        self.columns = headers[self.delimiter]
        if not any(self.columns):
            raise InputError(
                f"{setting} is empty; its first line must name its columns, as file,label"
            )

    def _read_header(self, delimiter: str) -> list[str]:
        with self._open_rows(delimiter) as rows:
            return [name.strip() for name in next(rows, [])]

    @contextmanager
    def _open_rows(self, delimiter: str) -> Iterator[Any]:
        """A reader of the lines, the first one included."""
        with (
            self._explain_errors(),
            self.file.open(encoding=self.encoding, newline="") as opened,
        ):
            reader = csv.reader(opened, delimiter=delimiter, skipinitialspace=True, strict=True)
            try:
                yield reader
            except csv.Error as error:
                raise InputError(
                    f"{self.setting} can't be read near line {reader.line_num} ({error}); correct its quotes"
                ) from error

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeError as error:
            raise InputError(
                f"{self.setting} is not UTF-8 text ({summarize_error(error)}); save it as CSV UTF-8"
            ) from error
        except OSError as error:
            raise InputError(
                f"{self.setting} can't be read ({error.strerror or error}); check its rights"
            ) from error

    def read(self, names: Sequence[str], most: int | None = None) -> list[ColumnValues]:
        places = [self.columns.index(name) for name in names]
        pick = itemgetter(*places)
        width = len(self.columns)
        picked: list[Any] = []
        with self._open_rows(self.delimiter) as rows:
            next(rows, None)
            for row in rows:
                if len(row) != width:
                    if not any(row):  # an empty line
                        continue
                    raise InputError(
                        f"line {rows.line_num} of {self.file} has {len(row)} fields, and the first line names {width} "
                        f"columns; a field that holds {self.delimiter!r} needs quotes"
                    )
                picked.append(pick(row))
                if len(picked) == most:
                    break
        if len(places) == 1:
            return [[field.strip() for field in picked]]
        columns = zip(*picked, strict=True) if picked else [() for _ in places]
        return [[field.strip() for field in column] for column in columns]

    def name_row(self, row: int) -> str:
        return f"row {row + 2}"  # as a spreadsheet counts, with the names of the columns in row 1


class ParquetTable(Table):
    """A parquet file, whose columns are text, numbers, truth values, dates, or lists of numbers."""

    def __init__(self, file: Path, setting: str) -> None:
        super().__init__(file, setting)
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise InputError(
                f'{setting} needs the library pyarrow; pip install "codegrid[tables]", or save the table as .csv'
            ) from error
        try:
            self._file = pq.ParquetFile(file)
        except Exception as error:  # pyarrow's, and the disk's
            raise self._explain(error) from error
        self.columns = list(self._file.schema_arrow.names)

    def _explain(self, error: Exception) -> InputError:
        return InputError(
            f"{self.setting} can't be read as a parquet file ({summarize_error(error)}); write it anew"
        )

    @property
    def naming_columns(self) -> list[str]:
        import pyarrow.types as kinds

        named = zip(self.columns, self._file.schema_arrow.types, strict=True)
        return [
            name
            for name, kind in named
            if kinds.is_string(kind)
            or kinds.is_large_string(kind)
            or kinds.is_integer(kind)
            or kinds.is_dictionary(kind)
        ]

    def read(self, names: Sequence[str], most: int | None = None) -> list[ColumnValues]:
        import pyarrow as pa

        try:
            first = None
            if most is not None:
                first = next(self._file.iter_batches(most, columns=list(names)), None)
            if first is None:
                table = self._file.read(columns=list(names))
            else:
                table = pa.Table.from_batches([first])
        except Exception as error:  # pyarrow's, and the disk's
            raise self._explain(error) from error
        return [read_arrow(table.column(name), f"{name} of {self.file}") for name in names]

    def name_row(self, row: int) -> str:
        return f"row {row + 1}"


def open_table(file: Path, setting: str, needed: Sequence[str]) -> Table:
    """The table in a file by its ending; `setting` names it in messages, and `needed` are the columns that settings name."""
    suffix = file.suffix.lower()
    if suffix not in (*DELIMITERS, *PARQUET):
        raise InputError(
            f"{setting} must be a table that ends with {', '.join([*DELIMITERS, PARQUET[0]])}; save it as .csv"
        )
    return ParquetTable(file, setting) if suffix in PARQUET else TextTable(file, setting, needed)


def read_arrow(column: Any, what: str) -> ColumnValues:
    """The values of a column of arrow's, of any type that can be a label, a number or a vector. Raises InputError for others."""
    import pyarrow as pa
    import pyarrow.types as kinds

    kind = column.type
    if kinds.is_dictionary(kind):
        return read_arrow(column.cast(kind.value_type), what)
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        if kinds.is_integer(kind.value_type) or kinds.is_floating(kind.value_type):
            return stack_vectors(column.to_numpy(), what)
    elif not (
        isinstance(kind, pa.BaseExtensionType)
        or kinds.is_nested(kind)
        or kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
    ):
        return [
            "" if value is None or value != value else str(value).strip()
            for value in column.to_pylist()
        ]
    raise InputError(
        f"the column {what} holds {kind}, and a column must hold text, numbers, or lists of numbers"
    )


def stack_vectors(vectors: Sequence[Any], what: str) -> NDArray[np.float64]:
    """Vectors (n, size); what is None becomes not a number. Raises InputError unless all have one size."""
    sizes = {len(vector) for vector in vectors if vector is not None}
    if len(sizes) > 1:
        raise InputError(
            f"the column {what} holds lists of {min(sizes)} to {max(sizes)} numbers; give all of them one length"
        )
    size = max(sizes, default=0)
    stacked = np.full((len(vectors), size), np.nan)
    for row, vector in enumerate(vectors):
        if vector is not None:
            stacked[row] = vector
    return stacked


@dataclass(frozen=True)
class Column:
    """What a model may be conditioned on: a value for each image.

    values   float32 (n,) or (n, size), not a number where there is none; or int64 (n,), -1 for none
    names    of whole numbers, what each stands for
    """

    values: NDArray[Any]
    names: list[str] | None = None

    @property
    def missing(self) -> int:
        """The number of images without a value."""
        if self.names is not None:
            return int((self.values < 0).sum())
        return int(np.isnan(self.values.reshape(len(self.values), -1)).any(1).sum())

    def describe(self) -> str:
        """What the values are, for the summary."""
        if self.names is not None:
            kind = f"{len(self.names):,} names"
        else:
            kind = "numbers" if self.values.ndim == 1 else f"{self.values.shape[1]:,} numbers each"
        return f"{kind}, {self.missing:,} images without" if self.missing else kind


def split_kind(name: str) -> tuple[str, bool]:
    """The column that an entry of data.columns names, and whether its numbers are names: site or site:text."""
    return name.removesuffix(AS_TEXT), name.endswith(AS_TEXT)


def convert_columns(
    parts: Sequence[ColumnValues], entry: str, what: str, names: Sequence[str] | None = None
) -> list[Column]:
    """The values of a column in several tables, or splits of one, as arrays of one kind.

    Lists in brackets, as [0.1, 0.2], become vectors; numbers become numbers, unless one begins with a zero, as the code 007
    does, or the `entry` of data.columns ends with :text; everything else becomes names. `names` are those that an earlier
    run recorded, which keep their numbers.
    """
    name, as_text = split_kind(entry)
    if all(isinstance(part, np.ndarray) for part in parts):
        stacked = stack_vectors([vector for part in parts for vector in part], what)
        return divide_column(Column(to_float32(stacked, what)), parts)
    texts = [text for part in parts for text in part]
    filled = [text for text in texts if text]
    if names is None and not as_text:
        if filled and all(text[0] == "[" and text[-1] == "]" for text in filled):
            vectors = [parse_vector(text, what) if text else None for text in texts]
            return divide_column(Column(to_float32(stack_vectors(vectors, what), what)), parts)
        if filled and are_numbers(filled):
            check_whole_numbers(filled, name, what)
            numbers = np.array([float(text) if text else np.nan for text in texts])
            return divide_column(Column(to_float32(numbers, what)), parts)
    ordered = order_names(filled, names)
    return divide_column(Column(number_texts(texts, ordered), ordered), parts)


def divide_column(column: Column, parts: Sequence[ColumnValues]) -> list[Column]:
    """A column of several parts, one after the other."""
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return [Column(values, column.names) for values in np.split(column.values, ends)]


def number_texts(texts: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """The place of each text among the names, -1 for an empty one."""
    places = {name: place for place, name in enumerate(names)}
    places.setdefault("", -1)
    return np.fromiter((places[text] for text in texts), np.int64, len(texts))


def are_numbers(texts: Sequence[str]) -> bool:
    """Whether all texts are numbers, none of which begins with a zero as codes do."""
    return all(NUMBER.fullmatch(text) and not LEADING_ZERO.match(text) for text in texts)


def check_whole_numbers(texts: Sequence[str], name: str, what: str) -> None:
    """Raise InputError if whole numbers, such as ids, are not the same as floating-point numbers of 32 bits."""
    if not all(WHOLE_NUMBER.fullmatch(text) for text in texts):
        return
    large = (text for text in texts if len(text) >= LONG_NUMBER)
    if inexact := next((text for text in large if int(np.float32(text)) != int(text)), None):
        raise InputError(
            f"the column {what} has {inexact}, which 32-bit numbers don't hold exactly; "
            f"data.columns=[{name}{AS_TEXT}] takes its values for names"
        )


def parse_vector(text: str, what: str) -> NDArray[np.float64]:
    """The numbers of a list in brackets, between commas or spaces."""
    try:
        return np.array(text[1:-1].replace(",", " ").split(), np.float64)
    except ValueError as error:
        raise InputError(
            f"the column {what} has {shorten_text(text)}, which is no list of numbers ({error}); write [0.1, 0.2]"
        ) from error


def to_float32(values: NDArray[np.float64], what: str) -> NDArray[np.float32]:
    """Numbers in 32 bits. Raises InputError for one that is infinite there."""
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    if np.isinf(short).any():
        raise InputError(
            f"the column {what} has {values[np.isinf(short)][0]}, which is no finite 32-bit number; correct it, or leave it empty"
        )
    return short


def shorten_text(text: str, n: int = 40) -> str:
    """A text of at most n characters."""
    return text if len(text) <= n else f"{text[: n - 3]}..."


def clean_labels(texts: Sequence[str]) -> list[str]:
    """Labels as text. Whole numbers that a program wrote as 1.0, because other rows have none, are 1 again."""
    if all(WHOLE_WITH_POINT.fullmatch(text) for text in texts if text):
        return [WHOLE_WITH_POINT.sub(r"\1", text) for text in texts]
    return list(texts)
