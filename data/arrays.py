"""Images in NumPy's files: .npy, and .npz of one picture."""

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from codegrid.data.pixels import MAX_CHANNELS
from codegrid.data.values import UnreadableImage, Values

NPY = b"\x93NUMPY"
ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an empty one
MAX_ARRAY_BYTES = 2**33  # what an array of 2^28 pixels of 16 channels and 16 bits has
NO_PICTURE = "name the endings of your images, as data.suffixes=[.png,.jpg], if it is none"


@dataclass(frozen=True)
class ArrayHeader:
    """What a .npy file says about itself; `offset` is the number of bytes before its values, from the file's start."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Axes:
    """Which axis of an array of this shape is channels: -1, 0, or None where there is one channel and no axis of it."""

    shape: tuple[int, ...]
    channel_axis: int | None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.shape[1:] if self.channel_axis == 0 else self.shape[:2]
        return rows, columns

    @property
    def channels(self) -> int:
        return 1 if self.channel_axis is None else self.shape[self.channel_axis]

    @property
    def note(self) -> str:
        """What was decided, for the summary."""
        if self.channel_axis is None:
            return ""
        return f"arrays with channels {'first' if self.channel_axis == 0 else 'last'}"

    def to_channels_last(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array with these axes as (h, w, c), without a copy."""
        if self.channel_axis is None:
            return array[:, :, None]
        return np.moveaxis(array, 0, 2) if self.channel_axis == 0 else array


def choose_axes(shape: tuple[int, ...], channels: int) -> Axes:
    """Which axis is channels, the first or the last: the one with as many entries as `channels`, data.channels.

    If none has, as where grey is made of colours, it is the only one that may be channels, of which there are 16 at most.
    Raises UnreadableImage if both or none may be, or if the array is no picture.
    """
    if len(shape) not in (2, 3) or not all(shape):
        raise UnreadableImage(
            f"an array {shape}, and pictures are (h, w), (h, w, c) or (c, h, w); {NO_PICTURE}"
        )
    if len(shape) == 2:
        return Axes(shape, None)
    possible = [axis for axis in (0, -1) if shape[axis] <= MAX_CHANNELS]
    convertible = {1: (3,), 3: (1,)}.get(channels, ())
    for counts in ((channels,), convertible, range(1, MAX_CHANNELS + 1)):
        matching = [axis for axis in possible if shape[axis] in counts]
        if len(matching) == 1:
            return Axes(shape, matching[0])
        if matching:
            raise UnreadableImage(
                f"an array {shape}, whose first axis may be channels as well as its last (data.channels={channels}); "
                f"pad the one that is not to more than {MAX_CHANNELS} entries"
            )
    raise UnreadableImage(
        f"an array {shape}, of which neither the first nor the last axis can be channels, {MAX_CHANNELS} at most; "
        "save its slices as files of their own"
    )


def read_header(file: IO[bytes]) -> ArrayHeader:
    """The header of a .npy file at its start. Raises UnreadableImage for damage and for what are no numbers."""
    try:
        version = npy_format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = npy_format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, is_fortran, dtype = npy_format.read_array_header_2_0(file)
        else:  # version 3 is for names of fields
            raise UnreadableImage(
                f"a .npy file of version {version[0]}, which holds no plain numbers"
            )
    except ValueError as error:
        raise UnreadableImage(f"a damaged .npy file ({str(error).splitlines()[0][:80]})") from error
    if dtype.kind not in "biuf":
        raise UnreadableImage(
            f"an array of {dtype}, and pictures are whole or floating-point numbers"
        )
    return ArrayHeader(shape, dtype, is_fortran, file.tell())


def to_plain_type(array: NDArray[Any]) -> NDArray[Any]:
    """Values in this machine's byte order, and of at most 32 bits if they are whole numbers, which NumPy makes 64 wide unasked.

    True and false become 255 and 0, as images of 1 bit have them.
    """
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "iu" and array.itemsize == 8:
        narrow = np.iinfo(np.int32 if array.dtype.kind == "i" else np.uint32)
        fits = not array.size or (array.min() >= narrow.min and array.max() <= narrow.max)
        return array.astype(narrow.dtype if fits else np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def take_values(array: NDArray[Any], axes: Axes) -> Values:
    """The values of an array that has these axes."""
    return Values(to_plain_type(axes.to_channels_last(array)), note=axes.note)


def read_array(content: bytes, channels: int) -> Values:
    """The picture in the content of a .npy or .npz file. `channels` is data.channels. Raises UnreadableImage."""
    with open_array(io.BytesIO(content)) as file:
        header = read_header(file)
        axes = choose_axes(header.shape, channels)
        if header.num_bytes > MAX_ARRAY_BYTES:
            raise UnreadableImage(f"an array {header.shape} of {header.dtype}, more than 8 GiB")
        values: bytes | memoryview
        if content.startswith(ZIP):
            values = file.read(header.num_bytes)
        else:  # without a copy
            values = memoryview(content)[header.offset : header.offset + header.num_bytes]
    if len(values) < header.num_bytes:
        raise UnreadableImage(
            f"a truncated array: {len(values):,} of {header.num_bytes:,} bytes are there"
        )
    array = np.frombuffer(values, header.dtype)
    return take_values(array.reshape(header.shape, order="F" if header.is_fortran else "C"), axes)


@contextmanager
def open_array(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The .npy file itself, or the one in a .npz file, open for reading at its start."""
    start = file.read(4)
    file.seek(0)
    if start not in ZIP:
        yield file
        return
    try:
        with zipfile.ZipFile(file) as archive, archive.open(choose_member(archive)) as member:
            yield member
    except NotImplementedError as error:  # a compression that zipfile doesn't know
        raise UnreadableImage(f"a .npz file that can't be unpacked ({error})") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise UnreadableImage(f"a damaged .npz file ({error})") from error


def choose_member(archive: zipfile.ZipFile) -> str:
    """The member that is the picture: arr_0, or the only array of two or three axes. Raises UnreadableImage."""
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    if "arr_0.npy" in names:
        return "arr_0.npy"
    shapes = {name.removesuffix(".npy"): read_member_shape(archive, name) for name in names}
    pictures = [name for name, shape in shapes.items() if len(shape) in (2, 3)]
    if len(pictures) == 1:
        return f"{pictures[0]}.npy"
    listed = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:10])
    if not pictures:
        raise UnreadableImage(f"no array of two or three axes ({listed or 'empty'}); {NO_PICTURE}")
    raise UnreadableImage(f"{len(pictures)} arrays may be the picture ({listed}); call it arr_0")


def read_member_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of an array of an archive; of one that holds no numbers it is ()."""
    with archive.open(name) as member:
        try:
            return read_header(member).shape
        except UnreadableImage:  # such as the array of the names of channels beside the picture
            return ()


def map_array(path: Path, header: ArrayHeader) -> NDArray[Any]:
    """The values of a .npy file as a memory map, of which only what is used is read. Raises UnreadableImage, OSError."""
    order: Any = "F" if header.is_fortran else "C"
    try:
        return np.memmap(path, header.dtype, "r", header.offset, header.shape, order)
    except ValueError as error:
        raise UnreadableImage("the file is shorter than its header says") from error
