"""Which row of a table describes which file: tables name files in many ways, and a column that names them has any name."""

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from codegrid.data.tables import Table, list_columns
from codegrid.engine.errors import InputError

SAMPLED_ROWS = 10_000  # by which it is found out how a table names files
NONE, SEVERAL = -1, -2  # the place of a name that no file has, or that several have
RIVAL = 0.5  # a column or prefix rivals the best one if it names at least this share of its files

Places = dict[str, int]  # what a file is called -> its place among the files, or SEVERAL


class FileNames:
    """What the files below a folder may be called in a table: by their paths below it, or without their folders or endings.

    root    the folder
    names   their paths below it, with slashes
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = [normalise_unicode(name) for name in names]
        self.prefix = f"{root.resolve().as_posix()}/"

    @cached_property
    def paths(self) -> Places:
        """The files by their paths."""
        return place_names(self.names)

    @cached_property
    def stems(self) -> Places:
        """The files by their paths without endings."""
        return place_names([posixpath.splitext(name)[0] for name in self.names])

    @cached_property
    def alone(self) -> Places:
        """The files by their names without folders."""
        return place_names([name.rpartition("/")[2] for name in self.names])

    @cached_property
    def alone_stems(self) -> Places:
        """The files by their names without folders and endings."""
        names = (name.rpartition("/")[2] for name in self.names)
        return place_names([posixpath.splitext(name)[0] for name in names])


def place_names(names: Sequence[str]) -> Places:
    """The place of each name, SEVERAL for one that occurs more than once."""
    places: Places = dict(zip(names, range(len(names)), strict=True))
    if len(places) < len(names):
        places |= {name: SEVERAL for name, n in Counter(names).items() if n > 1}
    return places


def normalise_unicode(text: str) -> str:
    """Text in one spelling of its letters, since file systems and spreadsheets differ."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def clean_path(text: str) -> str:
    """A path with slashes, without a leading ./ or other parts that mean nothing; empty for an empty cell."""
    if not text:
        return ""
    text = normalise_unicode(text)
    text = text.replace("\\", "/")
    if "//" in text or "./" in text or text[-1] in "./":
        return posixpath.normpath(text)
    return text


@dataclass(frozen=True)
class NameReading:
    """One way in which the values of a column may name files.

    how           what they are, for messages
    has_endings   whether the names have their endings
    read          the part of a cleaned value that is looked up; empty for a value that can't be read in this way
    places        where it is looked up
    """

    how: str
    has_endings: bool
    read: Callable[[str], str]
    places: Places

    def place(self, values: Sequence[str]) -> NDArray[np.int64]:
        """The place of the file that each value names, NONE or SEVERAL."""
        find, read = self.places.get, self.read
        texts = (read(clean_path(value)) for value in values)
        return np.fromiter(
            (find(text, NONE) if text else NONE for text in texts), np.int64, len(values)
        )


def list_readings(
    files: FileNames, table_folder: str, values: Sequence[str], has_endings: bool
) -> list[NameReading]:
    """The ways in which values, with the endings of files or without, may name the files, the likeliest first."""
    places, alone = (files.paths, files.alone) if has_endings else (files.stems, files.alone_stems)
    ways: list[tuple[str, Callable[[str], str], Places]] = [
        (f"paths below {files.root}", str, places),
        ("paths from the folder of the table", make_joiner(table_folder, files.prefix), places),
        *(
            (f"paths after {prefix}", make_cutter(prefix), places)
            for prefix in find_prefixes(values, places, files.prefix)
        ),
        ("names of files in any folder", take_name, alone),
    ]
    ending = "" if has_endings else ", without endings"
    return [NameReading(f"{how}{ending}", has_endings, read, where) for how, read, where in ways]


def make_joiner(table_folder: str, root: str) -> Callable[[str], str]:
    """A function that reads a path from the folder of the table, or one that begins at /, and returns its part below the root."""
    return lambda path: below(posixpath.normpath(posixpath.join(table_folder, path)), root)


def below(path: str, folder: str) -> str:
    """A path below a folder, whose name ends with a slash; empty if it lies elsewhere."""
    return path[len(folder) :] if path.startswith(folder) else ""


def take_name(path: str) -> str:
    """A name of a file, which stands alone."""
    return "" if "/" in path else path


def make_cutter(prefix: str) -> Callable[[str], str]:
    """A function that cuts this beginning off."""
    return lambda path: below(path, prefix)


def find_prefixes(values: Sequence[str], places: Places, root: str) -> list[str]:
    """The folder that stands before the paths of files, as where they lay on another machine; none if no value has one.

    Of several such folders the one is taken that ends as `root` does: of train/ and val/, train/ for .../train. If that does
    not decide, all that name about as many files are returned, and whoever reads them has to choose.
    """
    hits: Counter[str] = Counter()
    for value in values:
        path = clean_path(value)
        cut = path.find("/") + 1
        while cut:
            if path[cut:] in places:
                hits[path[:cut]] += 1
            cut = path.find("/", cut) + 1
    if not hits:
        return []
    most = max(hits.values())
    rivals = [prefix for prefix, n in hits.items() if n >= RIVAL * most]
    likeness = {prefix: count_shared_end(prefix, root) for prefix in rivals}
    best = max(likeness.values())
    return [prefix for prefix in rivals if likeness[prefix] == best]


def count_shared_end(a: str, b: str) -> int:
    """How many folders at the ends of two paths are the same."""
    mine, theirs = (PurePosixPath(path).parts[::-1] for path in (a, b))
    n = min(len(mine), len(theirs))
    return next((i for i in range(n) if mine[i] != theirs[i]), n)


@dataclass(frozen=True)
class Candidate:
    """A column read in one way.

    places   the place of the file that each sampled row names, NONE or SEVERAL
    """

    column: str
    reading: NameReading
    places: NDArray[np.int64]

    @cached_property
    def hits(self) -> int:
        """The number of rows that name a file."""
        return int((self.places >= 0).sum())

    def conflicts(self, other: "Candidate") -> bool:
        """Whether some row names another file by the other column or way of reading, or some file has another row."""
        mine, theirs = self.places, other.places
        if ((mine != theirs) & (mine >= 0) & (theirs >= 0)).any():
            return True
        shared = np.intersect1d(mine[mine >= 0], theirs[theirs >= 0])
        either = (mine >= 0) ^ (theirs >= 0)
        return bool(np.isin(np.maximum(mine, theirs)[either], shared).any())


def choose_reading(
    table: Table, columns: Sequence[str], files: FileNames
) -> tuple[str, NameReading]:
    """The column, one of these, whose values name most of the files, and how they do.

    A sample of the rows decides, or all rows if none of the sample names a file. Raises InputError if no column names files,
    or if several do, and by them a file has different rows.
    """
    folder = table.file.parent.resolve().as_posix()
    for most in (SAMPLED_ROWS, None):
        read = table.read(columns, most) if columns else []
        texts = {
            column: values
            for column, values in zip(columns, read, strict=True)
            if isinstance(values, list)
        }
        n = max(map(len, read), default=0)
        candidates = read_candidates(texts, files, folder, has_endings=True)
        # Names without endings count if those with endings leave most rows without a file.
        if not any(candidate.hits >= RIVAL * n for candidate in candidates):
            candidates += read_candidates(texts, files, folder, has_endings=False)
        if candidates:
            best = pick_candidate(candidates, table, files)
            return best.column, best.reading
        if n < SAMPLED_ROWS:
            break
    raise InputError(explain_no_match(table, columns, files))


def read_candidates(
    texts: Mapping[str, list[str]], files: FileNames, table_folder: str, has_endings: bool
) -> list[Candidate]:
    """The ways in which columns name at least one file."""
    candidates = [
        Candidate(column, reading, reading.place(values))
        for column, values in texts.items()
        for reading in list_readings(files, table_folder, values, has_endings)
    ]
    return [candidate for candidate in candidates if candidate.hits]


def pick_candidate(candidates: Sequence[Candidate], table: Table, files: FileNames) -> Candidate:
    """The candidate that names most files, the first of equals. Raises InputError if another one contradicts it."""
    most = max(candidate.hits for candidate in candidates)
    rivals = [candidate for candidate in candidates if candidate.hits >= RIVAL * most]
    with_endings = [c for c in rivals if c.reading.has_endings]
    rivals = with_endings or rivals
    best = max(rivals, key=lambda candidate: candidate.hits)
    for other in rivals:
        if other is best or not best.conflicts(other):
            continue
        if other.column != best.column:
            raise InputError(
                f"the columns {best.column} and {other.column} of {table.file} both name images of {files.root}, and not the "
                f"same ones in each row; say which one it is with data.file_column={best.column}"
            )
        raise InputError(
            f"the column {best.column} of {table.file} names images of {files.root} as {best.reading.how} and as "
            f"{other.reading.how}, and not the same ones; write paths below {files.root}"
        )
    return best


def explain_no_match(table: Table, columns: Sequence[str], files: FileNames) -> str:
    """The sentence about a table that names no file of a folder."""
    read = table.read(columns, 1) if columns else []
    examples = [
        f"{column}={values[0]}"
        for column, values in zip(columns, read, strict=True)
        if isinstance(values, list) and values
    ]
    shown = f"its first row has {list_columns(examples, 5)}" if examples else "it has no row"
    return (
        f"{table.setting} names no image of {files.root} in any row: {shown}, and the first image is {files.names[0]}; "
        "give the table of these images, with their paths below the folder in a column"
    )


@dataclass(frozen=True)
class Match:
    """The rows of a table and the files of a folder.

    rows      (n,) the row of each file, the first one if it has several, NONE if it has none
    doubled   the rows of each file that has several
    unused    whether each row names no file
    vague     whether each row names several files, which differ in their endings or folders alone
    """

    rows: NDArray[np.int64]
    doubled: dict[int, list[int]]
    unused: NDArray[np.bool_]
    vague: NDArray[np.bool_]


def match_rows(reading: NameReading, values: Sequence[str], n: int) -> Match:
    """Match the rows with these values to n files."""
    places = reading.place(values)
    rows = np.full(n, NONE, np.int64)
    named = np.flatnonzero(places >= 0)
    rows[places[named[::-1]]] = named[::-1]  # of several rows the first one is written last
    counts = np.bincount(places[named], minlength=n)
    several = set(np.flatnonzero(counts > 1).tolist())
    doubled: dict[int, list[int]] = {place: [] for place in sorted(several)}
    if several:
        for row in named.tolist():
            if (place := int(places[row])) in several:
                doubled[place].append(row)
    return Match(rows, doubled, places == NONE, places == SEVERAL)
