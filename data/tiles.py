"""Large pictures cut into tiles, each of which is an image of a dataset."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.form import Form
from codegrid.data.loading import count_cores
from codegrid.data.pixels import PixelRules
from codegrid.data.regions import DirectPicture, FileId, LargePicture, PixelBox, open_picture
from codegrid.data.samples import raise_unreadable
from codegrid.data.source import FileSource, RawImage, Source, spread
from codegrid.data.split import Names
from codegrid.data.store import Arrays, fingerprint, load_or_fill
from codegrid.data.threads import map_in_threads
from codegrid.data.values import UnreadableImage
from codegrid.engine.console import log_line, progress_bar
from codegrid.engine.errors import InputError, summarize_error
from codegrid.engine.sizes import Size, SizeSetting, check_size, write_size

PICTURE_SHAPES = "shapes"  # the array of a cache entry: rows, columns, and whether boxes are read without the rest


class TileSource(Source):
    """The tiles of files, in rows from the upper left; what is left at the right and at the bottom of a picture is in none.

    A tile is known by its file and its place there, in tiles: scan.tif[2,5]. Its label is that of the file. If pictures
    must be decoded whole, the tiles of each are one shard, so that training takes many of them while it is in memory.
    """

    has_names = True

    def __init__(
        self, whole: FileSource, tile: Size, shapes: NDArray[np.int64], channels: int
    ) -> None:
        """`shapes` (n, 3) are the rows and columns of each picture, and whether its boxes are read without the rest."""
        self.whole = whole
        self.tile = tile
        self.channels = channels
        self.sizes = shapes[:, :2]
        self.is_direct = shapes[:, 2] > 0
        self.grids = self.sizes // tile
        self.counts = self.grids.prod(1)
        self.starts = np.cumsum(self.counts) - self.counts
        described = {"tile": list(tile), "sizes": fingerprint(self.sizes.tolist())}
        super().__init__(int(self.counts.sum()), {"pictures": whole.key, **described})
        self.content_key = {"pictures": whole.content_key, **described}
        self.checked_up_front = whole.checked_up_front
        if whole.labels is not None:
            self.labels = np.repeat(np.asarray(whole.labels), self.counts)
        self.columns = {
            name: np.repeat(values, self.counts, 0) for name, values in whole.columns.items()
        }
        self.label_key = whole.label_key
        self.use_threads = bool(
            self.is_direct.all()
        )  # else several whole pictures would be decoded at once
        if not self.use_threads:
            self.shard_sizes = self.counts.tolist()

    @property
    def rules(self) -> PixelRules:
        return self.whole.rules

    @rules.setter
    def rules(self, rules: PixelRules) -> None:
        self.whole.rules = rules

    def locate(self, index: int) -> tuple[int, int, int]:
        """The number of the file of a tile, and its row and column there, in tiles."""
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        row, column = divmod(int(index - self.starts[number]), int(self.grids[number, 1]))
        return number, row, column

    def find_box(self, index: int) -> tuple[LargePicture, PixelBox]:
        """The picture that a tile is of, and where. Raises UnreadableImage."""
        number, row, column = self.locate(index)
        height, width = self.tile
        picture = open_file(self.whole, number, self.channels)
        if picture.size != tuple(self.sizes[number]):
            raise UnreadableImage("its size has changed since the tiles were counted")
        return picture, PixelBox(row * height, column * width, self.tile)

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        picture, box = self.find_box(index)
        label = -1 if self.labels is None else int(self.labels[index])
        try:
            return picture.read(box, form, self.rules), label
        except UnreadableImage:
            raise
        except Exception as error:  # of the disk, and of many decoders
            raise UnreadableImage(summarize_error(error)) from error

    def open_raw(self, index: int) -> RawImage | None:
        picture, box = self.find_box(index)
        if isinstance(picture, DirectPicture):
            return picture.read_values(box)
        return self.whole.open_raw(self.locate(index)[0])

    def pick_rows(self, most: int) -> list[int]:
        """Evenly spread tiles; of pictures that are decoded whole, one each."""
        rows, decoded = [], set()
        for row in spread(self.n, most):
            number = self.locate(row)[0]
            if number not in decoded:
                rows.append(row)
            if not self.is_direct[number]:
                decoded.add(number)
        return rows

    def image_name(self, index: int) -> str:
        number, row, column = self.locate(index)
        return f"{self.whole.image_name(number)}[{row},{column}]"

    def names(self) -> Names:
        return [
            f"{name}[{row},{column}]"
            for name, (rows, columns) in zip(self.whole.names(), self.grids.tolist(), strict=True)
            for row in range(rows)
            for column in range(columns)
        ]

    def image_sizes(self) -> NDArray[np.int64]:
        """The sizes of the files in bytes."""
        return np.repeat(self.whole.image_sizes(), self.counts)

    def shares_names(self, other: Source) -> bool:
        return isinstance(other, TileSource) and self.whole.shares_names(other.whole)

    def raw_content(self, index: int) -> bytes | None:
        return self.whole.raw_content(self.locate(index)[0])

    def count_pixels(self) -> tuple[int, int]:
        """The numbers of pixels of all pictures, and of those in no tile."""
        pixels = int(self.sizes.prod(1).sum())
        return pixels, pixels - self.n * self.tile[0] * self.tile[1]


def open_file(source: FileSource, number: int, channels: int) -> LargePicture:
    """The picture of a file of a source. Raises UnreadableImage."""
    return open_picture(FileId(source.files[number], source.stamps[number]), channels)


def check_tiles(setting: SizeSetting | None, stored_size: Size) -> Size | None:
    """data.tiles as (rows, columns). Raises InputError if a tile is smaller than what is made of it."""
    if setting is None:
        return None
    tile = check_size("data.tiles", setting, "pixel")
    if tile[0] < stored_size[0] or tile[1] < stored_size[1]:
        raise InputError(
            f"data.tiles={write_size(tile)} is smaller than the {write_size(stored_size)} pixels that each tile is scaled to "
            "(data.image_size, or data.resize for random crops); use tiles as large as that"
        )
    return tile


def check_num_pictures(n_val: Any, n: int) -> None:
    """Raise InputError unless n_val of n pictures can be held out, whole, whatever the number of their tiles."""
    if isinstance(n_val, int) and 0 < n_val < n:
        return
    advice = f"use data.n_val={max(1, n // 10)}" if n > 1 else "add another, or split it into two"
    raise InputError(
        f"data.n_val={n_val} of {n:,} picture{'s' * (n != 1)}: with data.tiles whole pictures validate, so that no tile "
        f"lies in one that trains; {advice}, or name a folder of others with data.val_root"
    )


def cut_tiles(
    source: Source,
    tile: Size,
    channels: int,
    title: str,
    cache_dir: str | None,
    skips: bool,
    patience: float | None,
) -> TileSource:
    """The tiles of the files of a source, whose sizes are read from their headers, or from `cache_dir` if it is not None.

    Pictures that can't be read, or that are smaller than a tile, are left out and logged if `skips`. Raises InputError for
    them otherwise, for a source that has no files, and if no tile is left.
    """
    if not isinstance(source, FileSource):
        raise InputError(
            "data.tiles cuts image files into tiles, and these images are none; use data=folder, or data.tiles=null"
        )
    shapes, faults = load_shapes(source, channels, title, cache_dir, patience)
    small = (shapes[:, :2] < tile).any(1)
    for number in np.flatnonzero(small):
        height, width = shapes[number, :2]
        reason = f"{width} x {height} pixels, less than a tile of data.tiles={write_size(tile)}"
        faults.setdefault(source.image_name(int(number)), reason)
    if faults and not skips:
        raise_unreadable(faults)
    rows = np.flatnonzero(~small)
    if faults:
        named = [f"{name} ({reason})" for name, reason in faults.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        if not len(rows):
            raise InputError(
                f"none of the {len(source):,} pictures of {title} can be cut into tiles: {', '.join(named[:5])}{more}"
            )
        log_line(
            f"{len(named)} of {len(source):,} pictures of {title} are left out: {', '.join(named[:5])}{more}"
        )
        source = source.subset(rows)
    return TileSource(source, tile, shapes[rows], channels)


def load_shapes(
    source: FileSource, channels: int, title: str, cache_dir: str | None, patience: float | None
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """The shapes (n, 3) of the pictures of a source (see TileSource), and the faults of those without one, name -> reason."""
    spec = {PICTURE_SHAPES: ((len(source), 3), "int64")}

    def fill(arrays: Arrays) -> dict[str, str]:
        faults = {}
        numbers = range(len(source))
        shapes = map_in_threads(
            lambda number: measure_picture(source, number, channels),
            numbers,
            4 + count_cores(),
            patience,
        )
        with closing(shapes), progress_bar(len(source), f"measuring {title}") as bar:
            for number, shape in zip(numbers, shapes, strict=True):
                bar.update(1)
                if isinstance(shape, str):
                    faults[source.image_name(number)] = shape
                else:
                    arrays[PICTURE_SHAPES][number] = shape
        return faults

    if cache_dir is None:
        arrays: Arrays = {PICTURE_SHAPES: np.zeros((len(source), 3), np.int64)}
        faults = fill(arrays)
    else:
        key = [source.key, channels]
        arrays, faults = load_or_fill(cache_dir, f"sizes-{title}", key, spec, fill)
    return measure_again(source, channels, np.array(arrays[PICTURE_SHAPES]), faults)


def measure_again(
    source: FileSource, channels: int, shapes: NDArray[np.int64], faults: Mapping[str, str]
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """The shapes and faults of pictures with those that had none measured now: what was wrong may lie outside of the file,
    such as a missing package or a permission, and be mended since."""
    remaining = {}
    numbers = [n for n in range(len(source)) if source.image_name(n) in faults] if faults else []
    for number in numbers:
        shape = measure_picture(source, number, channels)
        if isinstance(shape, str):
            remaining[source.image_name(number)] = shape
        else:
            shapes[number] = shape
    return shapes, remaining


def measure_picture(source: FileSource, number: int, channels: int) -> Sequence[int] | str:
    """The shape of a picture (see TileSource), or why it has none."""
    try:
        picture = open_file(source, number, channels)
    except UnreadableImage as error:
        return str(error)
    return *picture.size, int(isinstance(picture, DirectPicture))
