"""Pictures in NumPy's files."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegrid.data.arrays import Axes, choose_axes, map_array, read_array, read_header
from codegrid.data.values import UnreadableImage


def npy(array: NDArray[Any], **settings: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **settings)
    return content.getvalue()


def npz(compressed: bool = False, **arrays: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def ramp(*shape: int, dtype: str = "uint16") -> NDArray[Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "channels", "axis"),
    [
        ((48, 80), 1, None),
        ((48, 80), 3, None),  # grey is repeated
        ((48, 80, 5), 5, -1),
        ((5, 48, 80), 5, 0),
        ((3, 64, 5), 3, 0),  # data.channels decides between two that may be
        ((3, 64, 5), 5, -1),
        ((1, 48, 80), 1, 0),
        ((48, 80, 3), 1, -1),  # colours become grey
        ((3, 48, 80), 1, 0),
        ((48, 80, 1), 3, -1),
        ((48, 80, 4), 3, -1),  # which is refused later, by its number of channels
        ((16, 48, 80), 16, 0),
    ],
)
def test_the_channel_axis_is_the_one_with_as_many_entries_as_channels(
    shape: tuple[int, ...], channels: int, axis: int | None
) -> None:
    axes = choose_axes(shape, channels)
    assert axes == Axes(shape, axis)
    assert axes.size == ((64, 5) if shape == (3, 64, 5) and axis == 0 else axes.size)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_both_orders_of_axes_are_read_as_the_same_picture(channels: int) -> None:
    picture = ramp(20, 24, channels)
    last = read_array(npy(picture), channels)
    first = read_array(npy(picture.transpose(2, 0, 1)), channels)
    np.testing.assert_array_equal(last.array, picture)
    np.testing.assert_array_equal(first.array, picture)
    assert last.note == "arrays with channels last"
    assert first.note == "arrays with channels first"


def test_one_channel_needs_no_axis() -> None:
    values = read_array(npy(ramp(20, 24)), 1)
    np.testing.assert_array_equal(values.array[:, :, 0], ramp(20, 24))
    assert values.note == ""


@pytest.mark.parametrize(
    ("shape", "channels", "reason"),
    [
        ((3, 64, 3), 3, "whose first axis may be channels as well as its last (data.channels=3)"),
        ((3, 64, 3), 1, "whose first axis may be channels as well as its last (data.channels=1)"),
        ((4, 64, 5), 3, "whose first axis may be channels as well as its last (data.channels=3)"),
        ((100, 64, 64), 1, "neither the first nor the last axis can be channels, 16 at most"),
        ((7,), 1, "pictures are (h, w), (h, w, c) or (c, h, w)"),
        ((2, 3, 20, 24), 3, "pictures are (h, w), (h, w, c) or (c, h, w)"),
        ((0, 24), 1, "pictures are (h, w), (h, w, c) or (c, h, w)"),
    ],
)
def test_no_axis_is_guessed(shape: tuple[int, ...], channels: int, reason: str) -> None:
    with pytest.raises(UnreadableImage) as mistake:
        choose_axes(shape, channels)
    assert reason in str(mistake.value)
    assert str(shape) in str(mistake.value)


@pytest.mark.parametrize(
    "dtype", ["uint8", "<u2", ">u2", "<i2", ">i4", "<f4", ">f4", "f2", "f8", "int64"]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_type_and_order_keeps_its_values(dtype: str, order: Any) -> None:
    picture = np.asarray(
        ramp(20, 24, 2, dtype="int64") % 200 - (dtype not in ("uint8", "<u2", ">u2")) * 50
    )
    stored = np.array(picture, dtype, order=order)
    values = read_array(npy(stored), 2).array
    np.testing.assert_array_equal(values, picture)
    assert values.dtype == ("int32" if dtype == "int64" else np.dtype(dtype).newbyteorder("="))
    assert values.dtype.isnative


def test_wide_whole_numbers_stay_whole_where_32_bits_hold_them() -> None:
    for wide, narrow in (("int64", "int32"), ("uint64", "uint32")):
        ends = np.array([[np.iinfo(narrow).min, np.iinfo(narrow).max]], wide)
        values = read_array(npy(ends), 1).array
        assert values.dtype == narrow
        np.testing.assert_array_equal(values[:, :, 0], ends)
    beyond = np.array([[0, 2**40]])
    assert read_array(npy(beyond), 1).array[0, 1, 0] == 2.0**40


def test_true_is_white() -> None:
    values = read_array(npy(np.eye(8, dtype=bool)), 1).array
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values[:, :, 0], np.eye(8) * 255)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_file_holds_arr_0_or_one_picture(compressed: bool) -> None:
    picture = ramp(20, 24)
    for content in (
        npz(compressed, image=picture),
        npz(compressed, image=picture, spacing=np.ones(3), names=np.array(["a", "b"])),
        npz(compressed, arr_0=picture, arr_1=ramp(30, 40)),
    ):
        np.testing.assert_array_equal(read_array(content, 1).array[:, :, 0], picture)


def with_compression(content: bytes, method: int) -> bytes:
    """A .npz file whose member says that it is compressed by this method, in both of its headers."""
    changed = bytearray(content)
    changed[8:10] = method.to_bytes(2, "little")
    directory = content.index(b"PK\x01\x02")
    changed[directory + 10 : directory + 12] = method.to_bytes(2, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            npz(image=ramp(20, 24), mask=ramp(20, 24)),
            "2 arrays may be the picture (image (20, 24), mask (20, 24)); call it arr_0",
        ),
        (npz(spacing=np.ones(3)), "no array of two or three axes (spacing (3,))"),
        (npz(), "no array of two or three axes (empty)"),
        (npz(image=ramp(20, 24))[:200], "a damaged .npz file"),
        (with_compression(npz(image=ramp(20, 24)), 99), "a .npz file that can't be unpacked"),
        (npz(image=ramp(20, 24)).replace(b"NUMPY", b"XXXXX"), "a damaged .np"),
        (npy(ramp(20, 24))[:-1], "a truncated array: 959 of 960 bytes are there"),
        (npy(ramp(20, 24))[:30], "a damaged .npy file"),
        (npy(np.array(["a", "b"])), "an array of <U1"),
        (npy(np.ones((4, 4), complex)), "an array of complex128"),
        (npy(np.array([{}, {}]), allow_pickle=True), "an array of object"),
        (npy(np.zeros(3, [("a", "f4")])), "an array of [('a', '<f4')]"),
        (npy(ramp(20, 24)).replace(b"NUMPY\x01", b"NUMPY\x03"), "version 3"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage) as mistake:
        read_array(content, 1)
    assert reason in str(mistake.value)


def test_an_array_of_objects_runs_no_code() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            raise AssertionError("unpickled")

    content = npy(np.array([[1]], object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="array of object"):
        read_array(content, 1)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_memory_map_has_the_same_values(tmp_path: Any, order: Any) -> None:
    picture = np.array(ramp(20, 24, 3, dtype=">i2"), order=order)
    np.save(tmp_path / "a.npy", picture)
    with (tmp_path / "a.npy").open("rb") as file:
        header = read_header(file)
    mapped = map_array(tmp_path / "a.npy", header)
    np.testing.assert_array_equal(mapped[3:5, 7:9], picture[3:5, 7:9])
    assert mapped.shape == picture.shape
