"""Labels, and further columns, that a table has for image files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.labels import Classes, order_names
from codegrid.data.matching import NONE, FileNames, choose_reading, match_rows
from codegrid.data.source import FileSource
from codegrid.data.tables import (
    Column,
    ColumnValues,
    Table,
    clean_labels,
    convert_columns,
    list_columns,
    number_texts,
    open_table,
    split_kind,
)
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.words import format_word

MISMATCHES = ("stop", "skip")
NAMED_AT_MOST = 5  # names in a sentence


@dataclass(frozen=True)
class Labelling:
    """The settings of a table of labels. Configs of earlier runs lack them, and these runs had none.

    labels         the table of the images below data.root, and of those below data.val_root if `val_labels` is None
    val_labels     the table of the images below data.val_root
    label          the column of the labels; None: class folders stay the labels
    file_column    the column that names the files; None: the one whose values do
    columns        further columns that stay with the images
    column_names   the names that whole numbers stand for in columns of text, as a run recorded them
    mismatch       what to do at rows without a file, files without a row, and files of several rows: "stop", or "skip"
    """

    labels: str | None = None
    val_labels: str | None = None
    label: str | None = None
    file_column: str | None = None
    columns: Sequence[str] = ()
    column_names: Mapping[str, Sequence[str]] | None = None
    mismatch: str = "stop"

    def __post_init__(self) -> None:
        columns = [self.columns] if isinstance(self.columns, str) else list(self.columns or ())
        object.__setattr__(self, "columns", columns)
        if self.mismatch not in MISMATCHES:
            raise InputError(
                f"data.mismatch={self.mismatch} must be one of {', '.join(MISMATCHES)}"
            )
        names = [split_kind(entry)[0] for entry in columns]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"data.columns names {twice[0]} twice; once is enough")

    @classmethod
    def settings(cls) -> list[str]:
        """The names of the settings."""
        return [each.name for each in fields(cls)]

    def check_supported(self, supported: Sequence[str], dataset: str) -> None:
        """Raise InputError if a setting is set that the images of a dataset don't have."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value and value != each.default and each.name not in supported:
                raise InputError(
                    f"data.{each.name}={value} is no setting of {dataset}, whose labels are its own; tables are for images in "
                    "folders, data=folder and data=ffhq"
                )

    def check(self, has_val_root: bool) -> None:
        """Raise InputError for settings that need others."""
        if self.labels is None:
            for name in ("val_labels", "label", "file_column", "columns"):
                if value := getattr(self, name):
                    shown = f"[{','.join(value)}]" if name == "columns" else value
                    raise InputError(
                        f"data.{name}={shown} needs the table that has it; add data.labels=<table>"
                    )
        elif self.val_labels and not has_val_root:
            raise InputError(
                f"data.val_labels={self.val_labels} needs the folder of its images; add data.val_root=<folder>, or leave it out "
                "if images of data.root are held out"
            )


@dataclass(frozen=True)
class LabelledFiles:
    """Files with what a table says of them.

    sources        the files of each folder, with their labels and columns
    file_column    the column that names them; None if two tables have two such columns
    column_names   the names that numbers stand for in columns of text
    summary        what was read, for the summary of the images
    """

    sources: list[FileSource]
    file_column: str | None
    column_names: dict[str, list[str]]
    summary: str


class LabelledFolder:
    """A folder, its table, and the rows of its files.

    source        the files
    file_column   the column of the table that names them
    values        the values of this column, of the labels, and of the further columns, in all rows
    match         which rows name which files
    """

    def __init__(
        self, source: FileSource, table: Table, settings: Labelling, file_column: str | None
    ) -> None:
        self.source = source
        self.table = table
        self.label = settings.label
        self.entries = settings.columns
        names = FileNames(source.root, list(map(str, source.names())))
        others = {self.label, *(split_kind(entry)[0] for entry in self.entries)}
        candidates = [
            name
            for name in table.naming_columns
            if name and name not in others and table.columns.count(name) == 1
        ]
        if file_column is not None:
            candidates = [file_column]
        self.file_column, reading = choose_reading(table, candidates, names)
        self.how = reading.how
        columns = list(dict.fromkeys([self.file_column, *(each for each in others if each)]))
        self.values = dict(zip(columns, table.read(columns), strict=True))
        self.match = match_rows(reading, self.row_names, len(source))

    @property
    def row_names(self) -> list[str]:
        """What each row calls its file."""
        texts = self.values[self.file_column]
        assert isinstance(texts, list)
        return texts

    def name_rows(self, rows: Sequence[int]) -> list[str]:
        """The rows in messages: what they call their files, or their numbers if that is nothing."""
        return [self.row_names[row] or self.table.name_row(row) for row in rows]

    def describe_row(self, row: int) -> list[Any]:
        """The label and the columns of a row, to compare it with others."""
        values = (self.values[name] for name in self.values if name != self.file_column)
        return [each[row] if isinstance(each, list) else each[row].tobytes() for each in values]

    @cached_property
    def contradicted(self) -> list[int]:
        """The places of the files of several rows that are not the same."""
        return [
            place
            for place, rows in self.match.doubled.items()
            if any(self.describe_row(row) != self.describe_row(rows[0]) for row in rows[1:])
        ]

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """The places of the files that have a row, and not several that contradict each other."""
        has_row = self.match.rows != NONE
        has_row[self.contradicted] = False
        return np.flatnonzero(has_row)

    def pick(self, column: str) -> ColumnValues:
        """The values of a column for the files in `places`."""
        rows, values = self.match.rows[self.places], self.values[column]
        return [values[row] for row in rows.tolist()] if isinstance(values, list) else values[rows]

    def label_source(
        self, labels: Sequence[int] | None, classes: Sequence[str], columns: Mapping[str, Column]
    ) -> FileSource:
        """The files in `places` with these labels and columns; without labels, they stay those of their class folders."""
        whole, places = self.source, self.places.tolist()
        return FileSource(
            whole.root,
            [whole.files[place] for place in places],
            [whole.labels[place] for place in places] if labels is None else labels,
            whole.classes if labels is None else classes,
            [whole.stamps[place] for place in places],
            {name: column.values for name, column in columns.items()},
        )


def label_files(
    sources: Sequence[FileSource], settings: Labelling, classes: Classes
) -> LabelledFiles:
    """The files of a folder, or of one that trains and one that validates, with the labels and columns of their tables.

    `classes` is data.classes. Raises InputError if rows and files don't match and `settings.mismatch` is "stop".
    """
    folders = open_folders(sources, settings)
    check_match(folders, settings.mismatch)
    labels: list[list[int]] | None = None
    names: list[str] = []
    if settings.label is not None:
        labels, names = number_labels(folders, settings.label, classes)
    columns: list[dict[str, Column]] = [{} for _ in folders]
    for entry in settings.columns:
        name = split_kind(entry)[0]
        what = f"{name} of {folders[0].table.file}"
        converted = convert_recorded([f.pick(name) for f in folders], entry, what, settings)
        for part, column in zip(columns, converted, strict=True):
            part[name] = column
    return LabelledFiles(
        [
            folder.label_source(labels[i] if labels is not None else None, names, columns[i])
            for i, folder in enumerate(folders)
        ],
        folders[0].file_column if len({f.file_column for f in folders}) == 1 else None,
        {name: column.names for name, column in columns[0].items() if column.names is not None},
        summarize_tables(folders, columns[0]),
    )


def open_folders(sources: Sequence[FileSource], settings: Labelling) -> list[LabelledFolder]:
    """The folders and their tables. Raises InputError for a table or column that isn't there."""
    folders: list[LabelledFolder] = []
    columns = [("data.columns", split_kind(entry)[0]) for entry in settings.columns]
    named = [("data.label", settings.label), ("data.file_column", settings.file_column), *columns]
    wanted = [(key, name) for key, name in named if name is not None]
    if settings.label is None and not settings.columns:
        named_file, setting = find_table(sources[0], settings, False)
        table = open_table(named_file, setting, [])
        raise InputError(
            f"{setting} needs data.label=<column> or data.columns=[<columns>]; there is {list_columns(table.columns)}"
        )
    for i, source in enumerate(sources):
        table_file, setting = find_table(source, settings, is_val=i > 0)
        table = open_table(table_file, setting, [name for _, name in wanted])
        for key, name in wanted:
            table.check_column(key, name)
        folders.append(LabelledFolder(source, table, settings, settings.file_column))
    return folders


def find_table(source: FileSource, settings: Labelling, is_val: bool) -> tuple[Path, str]:
    """The file of a folder's table, and the setting that names it. Raises InputError if it isn't there."""
    key = "val_labels" if is_val and settings.val_labels else "labels"
    value = str(getattr(settings, key))
    setting = f"data.{key}={value}"
    table_file = Path(value).expanduser()
    if table_file.is_file():
        return table_file, setting
    inside = source.root / table_file.name
    if inside.is_file():
        raise InputError(f"{setting} is not a file; there is {format_word(f'data.{key}', inside)}")
    raise InputError(f"{setting} is not a file; say where the table is with data.{key}=<file>")


def check_match(folders: Sequence[LabelledFolder], mismatch: str) -> None:
    """Raise InputError if rows and files don't match; with "skip", log what is left out.

    Folders with one table share its rows, each of which has to name a file in one of them.
    """
    unused = [folder.match.unused for folder in folders]
    if len(folders) > 1 and folders[0].table.file == folders[1].table.file:
        both = np.flatnonzero(~unused[0] & ~unused[1])
        if len(both):
            roots = [str(folder.source.root) for folder in folders]
            raise InputError(
                f"{len(both):,} rows of {folders[0].table.file} name images in both {roots[0]} and {roots[1]}, as "
                f"{folders[0].name_rows([int(both[0])])[0]}; give the second a table of its own with data.val_labels=<table>"
            )
        unused = [unused[0] & unused[1], np.zeros_like(unused[1])]
    for folder, rows in zip(folders, unused, strict=True):
        if text := describe_mismatch(folder, rows):
            sentence = f"{folder.table.file} and {folder.source.root} don't match: {text}"
            if mismatch == "stop":
                raise InputError(
                    f"{sentence}; correct the table, or leave out what doesn't match with data.mismatch=skip"
                )
            log_line(f"{sentence}; these are left out")
        if not len(folder.places):
            raise InputError(
                f"no image of {folder.source.root} has one row in {folder.table.file}; correct the table"
            )


def describe_mismatch(folder: LabelledFolder, unused: NDArray[np.bool_]) -> str:
    """How many rows and files don't match, with the names of some; empty if all do."""
    match, source = folder.match, folder.source
    without = np.flatnonzero(match.rows == NONE).tolist()
    lists = {
        "rows without a file": folder.name_rows(np.flatnonzero(unused).tolist()),
        "rows that name several files": folder.name_rows(np.flatnonzero(match.vague).tolist()),
        "files without a row": [source.image_name(place) for place in without],
        "files of several rows": [source.image_name(place) for place in match.doubled],
    }
    texts = [
        f"{what}: {len(names):,} ({name_few(names)})" for what, names in lists.items() if names
    ]
    if match.doubled:
        contradicted = [source.image_name(place) for place in folder.contradicted]
        texts.append(
            f"whose rows differ: {len(contradicted):,} ({name_few(contradicted)})"
            if contradicted
            else "whose rows are the same, so the first counts"
        )
    return ", ".join(texts)


def name_few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED_AT_MOST:,} more" if len(names) > NAMED_AT_MOST else ""
    return f"{', '.join(names[:NAMED_AT_MOST])}{more}"


def number_labels(
    folders: Sequence[LabelledFolder], label: str, classes: Classes
) -> tuple[list[list[int]], list[str]]:
    """The number of each image's class, -1 for none, and the names of the classes, which are those of the first folder.

    Raises InputError if the second folder has others, which may be slips, or if no image has a label.
    """
    read = [folder.pick(label) for folder in folders]
    for folder, values in zip(folders, read, strict=True):
        if not isinstance(values, list):
            raise InputError(
                f"data.label={label} is a column of lists in {folder.table.file}; data.columns=[{label}] keeps them with the images"
            )
        if not any(values):
            raise InputError(
                f"data.label={label} is empty in all rows of the images below {folder.source.root}; name another column of "
                f"{folder.table.file}: {list_columns(folder.table.columns)}"
            )
    cleaned = iter(clean_labels([text for values in read for text in values]))
    texts = [[next(cleaned) for _ in values] for values in read]
    names = order_names({text for text in texts[0] if text}, classes)
    for folder, values in zip(folders[1:], texts[1:], strict=True):
        check_val_labels(folder, set(values) - {""}, names)
    for folder, values in zip(folders, texts, strict=True):
        if n := values.count(""):
            log_line(
                f"{n:,} images of {folder.source.root} have no {label} in {folder.table.file}, and have no class"
            )
    return [number_texts(values, names).tolist() for values in texts], names


def check_val_labels(folder: LabelledFolder, values: set[str], names: Sequence[str]) -> None:
    """Raise InputError for labels of validation images that no training image has; log which classes have none."""
    if unknown := sorted(values - set(names)):
        raise InputError(
            f"{folder.table.file} has labels for {folder.source.root} that no training image has: {name_few(unknown)}; "
            "write them as in training, or leave them empty"
        )
    if missing := [name for name in names if name not in values]:
        log_line(
            f"{folder.source.root} has images of {len(names) - len(missing)} of the {len(names)} classes, "
            f"none of {name_few(missing)}"
        )


def convert_recorded(
    parts: Sequence[ColumnValues], entry: str, what: str, settings: Labelling
) -> list[Column]:
    """A further column in several splits. Raises InputError if an earlier run had numbers where text is now."""
    name = split_kind(entry)[0]
    recorded = settings.column_names
    known = list(recorded[name]) if recorded is not None and name in recorded else None
    columns = convert_columns(parts, entry, what, known)
    if recorded is not None and known is None and columns[0].names is not None:
        raise InputError(
            f"the column {what} holds text, as {name_few(columns[0].names[:1])}, and held numbers when the run began; "
            "give the table that it began with"
        )
    return columns


def describe_columns(columns: Mapping[str, Column]) -> str:
    """What further columns hold, for the summary of the images."""
    return ", ".join(f"{name} ({column.describe()})" for name, column in columns.items())


def summarize_tables(folders: Sequence[LabelledFolder], columns: Mapping[str, Column]) -> str:
    """What was read from the table of the first folder, for the summary of the images."""
    folder = folders[0]
    parts = [f"{name} ({column.describe()})" for name, column in columns.items()]
    parts = [*([folder.label] if folder.label else []), *parts]
    return f"{', '.join(parts)} of {folder.table.file.name}, whose column {folder.file_column} has {folder.how}"
