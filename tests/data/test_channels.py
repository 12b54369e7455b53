"""Folders of images of any number of channels: what is decided, what the summary says, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.folder import Folder
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images

Array = NDArray[Any]


def draw(seed: int, channels: int, kind: str = "uint16") -> Array:
    top = 4000 if kind == "uint16" else 256
    return np.random.default_rng(seed).integers(0, top, (24, 40, channels)).astype(kind)


def write_bands(root: Path, *counts: int, **settings: Any) -> None:
    """Write TIFFs 0.tif, 1.tif ... of so many bands each."""
    root.mkdir(exist_ok=True)
    for i, channels in enumerate(counts):
        layout = {"photometric": "minisblack", "planarconfig": "contig", **settings}
        tifffile.imwrite(root / f"{i}.tif", draw(i, channels), **layout)


def write_sprites(root: Path, n: int, mode: str = "RGBA") -> None:
    root.mkdir(exist_ok=True)
    for i in range(n):
        samples = draw(i, len(mode), "uint8")
        Image.fromarray(samples if len(mode) > 1 else samples[..., 0]).save(root / f"{i}.png")


def open_folder(root: Path, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {
        "image_size": [24, 40], "n_val": 1, "held_out": "last", "cache_dir": str(root.parent / "cache"),
    }  # fmt: skip
    return make_images(Folder, str(root), **{**defaults, **settings})


def read_mistake(data: Folder) -> str:
    with pytest.raises(InputError) as raised:
        for split in ("train", "val"):
            data.samples(split)
    return str(raised.value)


def pixels_of(data: Folder) -> list[Array]:
    data.prepare_data()
    samples = data.samples("train")
    images, _ = samples.__getitems__(list(range(len(samples))))
    return [image.numpy() for image in images]


def test_a_range_that_was_found_for_other_channels_is_not_taken(tmp_path: Path) -> None:
    for i in range(6):
        values = np.random.default_rng(i).random((24, 40, 5)) * [1, 10, 100, 1000, 10000]
        (tmp_path / "root").mkdir(exist_ok=True)
        tifffile.imwrite(
            tmp_path / "root" / f"{i}.tif",
            values.transpose(2, 0, 1).astype("float32"),
            photometric="minisblack",
        )
    for channels in (1, 5, 1):
        data = open_folder(tmp_path / "root", channels=channels)
        data.prepare_data()
        assert len(data.rules.ranges) == channels


def test_grey_files_among_colours_serve_where_each_colour_has_a_range(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for i in range(6):
        values = draw(i, 3)
        tifffile.imwrite(tmp_path / "root" / f"{i}.tif", values[..., 0] if i % 2 else values)
    data = open_folder(tmp_path / "root", channels=3, range="percentiles")
    data.prepare_data()
    assert len(data.rules.ranges) == 3
    assert len(pixels_of(data)) > 0


def test_the_alpha_of_sprites_is_a_fourth_channel_if_it_is_counted(tmp_path: Path) -> None:
    write_sprites(tmp_path / "sprites", 3)
    data = open_folder(tmp_path / "sprites", channels=4)
    for i, pixels in enumerate(pixels_of(data)):
        assert np.array_equal(pixels, draw(i, 4, "uint8").transpose(2, 0, 1))
    described = data.describe()
    assert described["summary"]["pixels"] == (
        "8-bit RGB with alpha; the channel marked alpha is data"
    )
    assert described["odd"] == []
    assert data.rules.depth == 8


def test_grey_with_alpha_has_two_channels_and_becomes_four_if_they_are_asked_for(
    tmp_path: Path,
) -> None:
    write_sprites(tmp_path / "two", 3, "LA")
    [first, _] = pixels_of(open_folder(tmp_path / "two", channels=2))
    assert np.array_equal(first, draw(0, 2, "uint8").transpose(2, 0, 1))
    [first, _] = pixels_of(open_folder(tmp_path / "two", channels=4))
    assert np.array_equal(first, draw(0, 2, "uint8")[..., [0, 0, 0, 1]].transpose(2, 0, 1))


def test_inks_are_four_channels(tmp_path: Path) -> None:
    (tmp_path / "print").mkdir()
    for i in range(2):
        Image.fromarray(draw(i, 4, "uint8"), mode="CMYK").save(tmp_path / "print" / f"{i}.tif")
    [pixels] = pixels_of(open_folder(tmp_path / "print", channels=4))
    assert np.array_equal(pixels, draw(0, 4, "uint8").transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "16-bit of 5 channels; values 0 to 3,9"),
        ({"planarconfig": None}, "; one page a row"),
    ],
)
def test_the_summary_says_what_bands_are_and_where_they_lie(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    write_bands(tmp_path / "bands", 5, 5, 5, **settings)
    data = open_folder(tmp_path / "bands", channels=5)
    data.prepare_data()
    described = data.describe()
    assert expected in described["summary"]["pixels"]
    assert described["summary"]["sizes"] == "40 x 24"
    assert described["odd"] == []


def test_a_number_of_channels_that_no_image_has_is_a_sentence_with_the_way_out(
    tmp_path: Path,
) -> None:
    write_bands(tmp_path / "bands", 5, 5, 5)
    assert read_mistake(open_folder(tmp_path / "bands")) == (
        "data.channels=3, and all of 3 images looked at have 5, as 0.tif; use data.channels=5"
    )
    data = open_folder(tmp_path / "bands", channels=5)
    assert len(pixels_of(data)) == 2  # the advice is accepted


def test_bands_by_row_are_refused_for_three_channels_and_not_read_as_narrow_pictures(
    tmp_path: Path,
) -> None:
    write_bands(tmp_path / "bands", 5, 5, planarconfig=None)
    message = "have 5, as 0.tif (one page a row); use data.channels=5"
    assert message in read_mistake(open_folder(tmp_path / "bands"))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_image_with_other_channels_than_the_rest_is_named(
    tmp_path: Path, on_error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bands(tmp_path / "mixed", 5, 3, 5, 5)
    data = open_folder(tmp_path / "mixed", channels=5, on_error=on_error)
    reason = "1.tif can't be read as an image (3 channels, where data.channels=5); repair it or take it out"
    if on_error == "stop":
        assert reason in read_mistake(data)
    else:
        assert len(pixels_of(data)) == 2
        assert "1 of 3 train images can't be read and are left out: 1.tif (3 channels, where" in (
            capsys.readouterr().err
        )


def test_images_of_several_other_numbers_of_channels_get_no_advice_that_is_refused(
    tmp_path: Path,
) -> None:
    write_bands(tmp_path / "mixed", 5, 6, 5)
    assert read_mistake(open_folder(tmp_path / "mixed", channels=4)) == (
        "data.channels=4, and images have other numbers of channels, 5 in 0.tif, 6 in 1.tif; put those of one number into "
        "a folder of their own"
    )


def test_an_opaque_picture_among_sprites_is_named(tmp_path: Path) -> None:
    write_sprites(tmp_path / "sprites", 3)
    Image.fromarray(draw(9, 3, "uint8")).save(tmp_path / "sprites" / "0.png")
    assert "0.png can't be read as an image (3 channels, where data.channels=4)" in read_mistake(
        open_folder(tmp_path / "sprites", channels=4)
    )


def test_a_stack_of_pages_says_which_channels_would_read_them(tmp_path: Path) -> None:
    root = tmp_path / "stacks"
    root.mkdir()
    for i in range(3):
        tifffile.imwrite(root / f"{i}.tif", draw(i, 5).transpose(2, 0, 1), photometric="minisblack")
    data = open_folder(root)
    data.prepare_data()
    assert data.describe()["odd"] == [
        "3 of 3 images are TIFFs of several pages, of which the first alone is read; data.channels=5 reads the 5 pages of "
        "0.tif as channels"
    ]
    data = open_folder(root, channels=5)
    data.prepare_data()
    described = data.describe()
    assert described["odd"] == []
    assert described["summary"]["pixels"].endswith("; one page a band")
