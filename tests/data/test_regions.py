"""Boxes of pictures that are read without the rest."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from codegrid.data import regions
from codegrid.data.decode import decode
from codegrid.data.form import Form
from codegrid.data.pieces import held_pieces
from codegrid.data.pixels import PixelRules
from codegrid.data.regions import (
    ArrayPicture,
    DirectPicture,
    FileId,
    LargePicture,
    MappedTiff,
    PixelBox,
    SegmentedTiff,
    WholePicture,
    open_picture,
)
from codegrid.data.source import file_stamp
from codegrid.data.values import UnreadableImage
from tests.helpers.dicoms import dicom_file

BOXES = [
    PixelBox(0, 0, (16, 16)),
    PixelBox(5, 7, (33, 40)),
    PixelBox(44, 60, (16, 20)),
    PixelBox(0, 0, (60, 80)),
    PixelBox(31, 15, (1, 2)),
]
RULES = PixelRules((0, 65535), depth=16)


@pytest.fixture(autouse=True)
def nothing_held() -> None:
    held_pieces.clear()


def picture_of(*shape: int, dtype: str = "uint16", seed: int = 0) -> NDArray[Any]:
    top = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1000
    values = np.random.default_rng(seed).integers(0, top, shape)
    return values.astype(dtype)


def opened(path: Path, channels: int) -> LargePicture:
    return open_picture(FileId(path, file_stamp(path)), channels)


def check_boxes(
    path: Path, channels: int, rules: PixelRules = RULES, close: int = 0
) -> LargePicture:
    """Each box has the pixels that the same part of the whole picture has."""
    picture = opened(path, channels)
    assert picture.size == (60, 80)
    whole = decode(path.read_bytes(), Form((60, 80), channels), rules)
    for box in BOXES:
        part = picture.read(box, Form(box.size, channels), rules)
        expected = whole[:, *box.slices]
        assert part.dtype == expected.dtype
        assert np.abs(part.astype(int) - expected).max() <= close
    return picture


TIFFS: list[dict[str, Any]] = [
    {"tile": (16, 32)},
    {"tile": (32, 16), "compression": "zlib"},
    {"tile": (16, 16), "compression": "lzw", "predictor": True},
    {"tile": (16, 16), "compression": "zstd", "bigtiff": True},
    {"tile": (16, 16), "byteorder": ">"},
    {"tile": (16, 16), "byteorder": ">", "compression": "zlib", "predictor": True},
    {"rowsperstrip": 7},
    {"rowsperstrip": 7, "compression": "zlib"},
    {"rowsperstrip": 60, "compression": "zlib"},
    {"compression": "zlib", "byteorder": ">"},
    {},
    {"byteorder": ">"},
]


@pytest.mark.parametrize("settings", TIFFS, ids=str)
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, "uint16"), (3, "uint16"), (5, "uint16"), (3, "uint8")]
)
def test_a_box_of_a_tiff_is_the_part_of_the_whole(
    tmp_path: Path, settings: dict[str, Any], planar: str, channels: int, dtype: str
) -> None:
    array = picture_of(60, 80, channels, dtype=dtype)
    if channels == 1:
        array = array[..., 0]
    elif planar == "separate":
        array = array.transpose(2, 0, 1)
    layout: dict[str, Any] = {} if channels == 1 else {"planarconfig": planar}
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric, **layout, **settings)
    rules = RULES if dtype == "uint16" else PixelRules()
    picture = check_boxes(tmp_path / "a.tif", channels, rules)
    assert isinstance(picture, DirectPicture)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_a_page_a_band_is_read_in_boxes(tmp_path: Path, compression: Any, tile: Any) -> None:
    array = picture_of(5, 60, 80)
    tifffile.imwrite(
        tmp_path / "a.tif", array, compression=compression, tile=tile, photometric="minisblack"
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 5
    picture = check_boxes(tmp_path / "a.tif", 5)
    mapped = compression is None and tile is None
    assert isinstance(picture, MappedTiff if mapped else SegmentedTiff)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_page_a_row_is_mapped_or_read_whole(tmp_path: Path, compression: Any) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", picture_of(60, 80, 5), compression=compression, photometric="minisblack"
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 60
    picture = check_boxes(tmp_path / "a.tif", 5)
    assert isinstance(picture, MappedTiff if compression is None else WholePicture)


def test_a_tiff_with_alpha_is_blended_as_the_whole_one(tmp_path: Path) -> None:
    for dtype, rules in (("uint8", PixelRules()), ("uint16", RULES)):
        array = picture_of(60, 80, 4, dtype=dtype)
        tifffile.imwrite(
            tmp_path / f"{dtype}.tif",
            array,
            photometric="rgb",
            extrasamples=["unassalpha"],
            tile=(16, 16),
        )
        assert isinstance(check_boxes(tmp_path / f"{dtype}.tif", 3, rules), SegmentedTiff)
        assert isinstance(check_boxes(tmp_path / f"{dtype}.tif", 4, rules), SegmentedTiff)


def test_colours_that_are_multiplied_by_alpha_are_divided_as_in_the_whole(tmp_path: Path) -> None:
    array = picture_of(60, 80, 4, dtype="uint16")
    tifffile.imwrite(
        tmp_path / "a.tif", array, photometric="rgb", extrasamples=["assocalpha"], tile=(16, 16)
    )
    assert isinstance(check_boxes(tmp_path / "a.tif", 3), SegmentedTiff)


def test_float_values_and_marks_of_no_data_are_read_in_boxes(tmp_path: Path) -> None:
    array = picture_of(60, 80, dtype="float32") - 500
    array[3:9] = -9999
    tifffile.imwrite(
        tmp_path / "a.tif", array, tile=(16, 16), extratags=[(42113, 2, 0, "-9999", True)]
    )
    picture = check_boxes(tmp_path / "a.tif", 1, PixelRules((-512, 511), depth=16))
    assert isinstance(picture, SegmentedTiff)
    assert picture.read_values(BOXES[0]).missing == -9999


def test_a_pyramid_is_read_at_its_full_size(tmp_path: Path) -> None:
    array = picture_of(60, 80, 3, dtype="uint8")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        settings: dict[str, Any] = {"tile": (16, 16), "photometric": "rgb"}
        file.write(array, subifds=1, **settings)
        file.write(array[::2, ::2], subfiletype=1, **settings)
    picture = opened(tmp_path / "a.tif", 3)
    assert picture.size == (60, 80)
    part = picture.read(BOXES[1], Form(BOXES[1].size, 3), PixelRules())
    np.testing.assert_array_equal(part, array[BOXES[1].slices].transpose(2, 0, 1))


def test_jpeg_in_a_tiff_is_read_in_boxes(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
    for tile in ((16, 16), (32, 32)):  # the second has tiles beyond the border
        tifffile.imwrite(
            tmp_path / "a.tif", smooth, photometric="rgb", tile=tile, compression="jpeg"
        )
        assert isinstance(check_boxes(tmp_path / "a.tif", 3, PixelRules(), close=2), SegmentedTiff)


def test_other_kinds_are_read_whole_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = picture_of(60, 80, 3, dtype="uint8")
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg", quality=95)
    image.convert("P").save(tmp_path / "c.png")
    image.convert("CMYK").save(tmp_path / "d.tif")
    np.savez(tmp_path / "e.npz", array)
    (tmp_path / "f.dcm").write_bytes(dicom_file(array[..., 0]))
    Image.fromarray(picture_of(60, 80)).save(tmp_path / "g.png")
    decoded = []

    def count_decoded(*arguments: Any) -> Any:
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(regions, "decode", count_decoded)
    for n, path in enumerate(sorted(tmp_path.iterdir()), 1):
        rules = RULES if path.name == "g.png" else PixelRules()
        assert isinstance(check_boxes(path, 3, rules), WholePicture)
        assert len(decoded) == n


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_is_upright_in_boxes(tmp_path: Path, orientation: int) -> None:
    size = (80, 60) if orientation in (6, 8) else (60, 80)
    image = Image.fromarray(picture_of(*size, 3, dtype="uint8"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    image.save(tmp_path / "b.png", exif=exif)
    for name in ("a.jpg", "b.png"):
        check_boxes(tmp_path / name, 3, PixelRules())
    tag = [(274, 3, 1, orientation, True)]
    deep = picture_of(*size, 3)
    tifffile.imwrite(tmp_path / "c.tif", deep, photometric="rgb", tile=(16, 16), extratags=tag)
    check_boxes(tmp_path / "c.tif", 3)


def test_a_png_that_says_at_its_end_how_it_is_turned_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(picture_of(60, 80, 3, dtype="uint8")).save(content, "PNG", exif=exif)
    data = content.getvalue()
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    (tmp_path / "a.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    picture = opened(tmp_path / "a.png", 3)
    with pytest.raises(UnreadableImage, match="60 x 80 pixels, where its header says 80 x 60"):
        picture.read(BOXES[0], Form((16, 16), 3), PixelRules())


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_box_of_a_npy_file_is_mapped(tmp_path: Path, order: Any) -> None:
    for name, axes in (("last", (0, 1, 2)), ("first", (2, 0, 1))):
        array = np.array(picture_of(60, 80, 2, dtype="float32").transpose(axes), order=order)
        np.save(tmp_path / f"{name}.npy", array)
        picture = check_boxes(tmp_path / f"{name}.npy", 2, PixelRules((-512, 511), depth=16))
        assert isinstance(picture, ArrayPicture)
        assert picture.read_values(BOXES[0]).note == f"arrays with channels {name}"
    np.save(tmp_path / "grey.npy", picture_of(60, 80))
    assert isinstance(check_boxes(tmp_path / "grey.npy", 1), ArrayPicture)


def test_a_box_is_brought_to_its_form(tmp_path: Path) -> None:
    """A tile of a mapped picture and one of a picture that was decoded whole are resized alike."""
    array = picture_of(60, 80, 3, dtype="uint8")
    np.save(tmp_path / "a.npy", array)
    Image.fromarray(array).save(tmp_path / "b.png")
    box, form = PixelBox(8, 16, (32, 48)), Form((16, 24), 3)
    pixels = [
        opened(tmp_path / name, 3).read(box, form, PixelRules()) for name in ("a.npy", "b.png")
    ]
    np.testing.assert_array_equal(*pixels)
    assert pixels[0].shape == (3, 16, 24)


def test_only_the_segments_of_a_box_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage elsewhere does not matter, and neither does the size of the picture."""
    array = picture_of(64, 64)
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offsets, counts = file.pages.first.dataoffsets, file.pages.first.databytecounts
    content = bytearray((tmp_path / "a.tif").read_bytes())
    for number in range(16):
        if number not in (5, 6):
            content[offsets[number] : offsets[number] + counts[number]] = bytes(counts[number])
    (tmp_path / "a.tif").write_bytes(content)
    picture = opened(tmp_path / "a.tif", 1)
    part = picture.read(PixelBox(16, 16, (16, 32)), Form((16, 32), 1), RULES)
    np.testing.assert_array_equal(part[0], array[16:32, 16:48])
    with pytest.raises(UnreadableImage, match="segment 0: "):
        picture.read(PixelBox(0, 0, (16, 16)), Form((16, 16), 1), RULES)


def test_segments_that_a_file_leaves_out_are_no_data(tmp_path: Path) -> None:
    tiles = [np.ones((16, 16), np.uint16), None, None, np.full((16, 16), 4, np.uint16)]
    tifffile.imwrite(tmp_path / "a.tif", iter(tiles), shape=(32, 32), dtype="uint16", tile=(16, 16))
    part = opened(tmp_path / "a.tif", 1).read(PixelBox(8, 8, (16, 16)), Form((16, 16), 1), RULES)
    expected = np.zeros((16, 16))
    expected[:8, :8], expected[8:, 8:] = 1, 4
    np.testing.assert_array_equal(part[0], expected)


@pytest.mark.parametrize(
    "settings", [{}, {"tile": (16, 16)}, {"compression": "zlib", "rowsperstrip": 8}], ids=str
)
def test_a_truncated_file_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture_of(60, 80), **settings)
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[:-500])
    np.save(tmp_path / "a.npy", picture_of(60, 80))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    for name in ("a.tif", "a.npy"):
        with pytest.raises(UnreadableImage, match="truncated"):
            opened(tmp_path / name, 1).read(PixelBox(44, 64, (16, 16)), Form((16, 16), 1), RULES)


def test_what_is_no_picture_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.tif").write_bytes(b"II*\0\x08\0\0\0")
    np.save(tmp_path / "d.npy", np.zeros(3))
    tifffile.imwrite(
        tmp_path / "e.tif", picture_of(60, 80, 5), photometric="minisblack", planarconfig="contig"
    )
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UnreadableImage):
            opened(path, 3)
    with pytest.raises(UnreadableImage):
        open_picture(FileId(tmp_path / "none.png", (-1, -1)), 3)


def test_without_a_codec_pillow_reads_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"tile": (16, 16), "compression": "lzw", "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", picture_of(60, 80, 3, dtype="uint8"), **settings)
    tifffile.imwrite(tmp_path / "b.tif", picture_of(60, 80, 3), **settings)
    monkeypatch.setattr(regions, "has_codec", lambda page: False)
    assert isinstance(check_boxes(tmp_path / "a.tif", 3, PixelRules()), WholePicture)
    with pytest.raises(
        UnreadableImage, match="LZW compression, which needs pip install imagecodecs"
    ):
        opened(tmp_path / "b.tif", 3)
