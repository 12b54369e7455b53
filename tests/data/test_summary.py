"""What a dataset's summary says, and what it finds odd."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.decode import open_image
from codegrid.data.folder import Folder
from codegrid.data.form import Form
from codegrid.data.shapes import Shapes
from codegrid.data.source import Source
from codegrid.data.summary import SPLIT_NAME
from codegrid.data.survey import can_be_mask, survey_sources
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images

Write = Callable[..., None]


def paint(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


def write(root: Path, counts: dict[str, int], **settings: Any) -> None:
    """Write so many images, each different, into each of these folders."""
    for seed, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            paint(1000 * seed + i, **settings).save(root / name / f"{i}.png")


def describe(root: Path, **settings: Any) -> dict[str, Any]:
    defaults = {"image_size": 16, "n_val": 2, "cache_dir": str(root.parent / "cache")}
    data = make_images(Folder, str(root), **{**defaults, **settings})
    data.prepare_data()
    return data.describe()


def odd(root: Path, **settings: Any) -> str:
    return "\n".join(describe(root, **settings)["odd"])


def test_an_ordinary_folder_is_summed_up_and_nothing_is_odd(root: Path) -> None:
    write(root, {"cats": 8, "dogs": 8})
    described = describe(root, held_out="last")
    assert described["summary"] == {
        "classes": "2: 0=cats (8), 1=dogs (6)",
        "sizes": "24 x 20",
        "pixels": "8-bit RGB",
    }
    assert described["odd"] == []


def test_drawn_images_have_classes_alone(tmp_path: Path) -> None:
    data = make_images(Shapes, n_train=20, n_val=4, image_size=16, cache_dir=str(tmp_path))
    data.prepare_data()
    described = data.describe()
    assert list(described["summary"]) == ["classes"]
    assert described["summary"]["classes"].startswith("5: 0=1 shape (")
    assert described["odd"] == []


def test_sizes_and_kinds_are_counted_and_a_sample_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, {"a": 5})
    paint(7, (50, 30)).convert("L").save(root / "a" / "grey.png")
    summary = describe(root)["summary"]
    assert summary["sizes"] == "24 x 20 to 30 x 50 pixels, 2 different"
    assert summary["pixels"] == "8-bit RGB (5 of 6), 8-bit grey (1 of 6)"
    monkeypatch.setattr("codegrid.data.survey.SURVEYED", 2)
    assert describe(root)["summary"]["sizes"].endswith("(in 4 of 6 images)")


def test_values_of_more_bits_are_named_with_what_becomes_black_and_white(root: Path) -> None:
    root.mkdir()
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 3000, (16, 16), np.uint16)
        values[0, :2] = 0, 3000
        Image.fromarray(values).save(root / f"{i}.png")
    assert describe(root)["summary"]["pixels"] == (
        "16-bit grey; values 0 to 3,000, of which 0 becomes black and 4,095 white; pixels of 16 bits"
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"training_set": 4, "test_set": 4}, "training_set, test_set look like splits"),
        ({"trainA": 4, "trainB": 4, "testA": 4}, "/images/trainA data.val_root="),
        ({"Train_Images": 4, "eval-images": 4}, "/images/eval-images uses two as splits"),
        ({"train2017": 4, "val2017": 4}, "/images/val2017 uses two as splits"),
        ({"cats/train": 4, "cats/test": 4}, "train, test inside of the classes look like splits"),
        ({"all/train/cats": 4, "all/valid/cats": 4}, "train, valid inside of the classes"),
    ],
)
def test_splits_that_are_taken_for_classes_are_odd(
    root: Path, counts: dict[str, int], expected: str
) -> None:
    write(root, counts)
    assert expected in odd(root)


@pytest.mark.parametrize(
    "name", ["cats", "trainers", "tester", "value", "train-station", "testudo", "Valencia", "a"]
)
def test_names_that_only_begin_like_a_split_are_none(name: str) -> None:
    assert not SPLIT_NAME.fullmatch(name)


def test_a_split_of_few_training_images_is_odd(root: Path) -> None:
    write(root, {"a": 26})
    assert (
        odd(root, n_val=24)
        == "only 2 of 26 images train, and 24 validate; data.n_val=2 holds out a tenth"
    )
    assert not odd(root, n_val=13)


def test_the_advice_for_a_split_is_accepted(root: Path) -> None:
    write(root, {"a": 3})
    assert "data.n_val=1 " in odd(root, n_val=2)
    assert not odd(root, n_val=1)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"cats": 30, "dogs": 2}, "classes have from 2 images (dogs) to 30 (cats)"),
        (
            {"3": 3, "10": 3, "7": 3},
            "numbers, 3 to 10, and their own numbers are 0 to 2: label=0 is 3",
        ),
        ({"": 3, "cats": 3}, "3 images lie in no class folder and are a class by themselves"),
    ],
)
def test_odd_classes_are_named(root: Path, counts: dict[str, int], expected: str) -> None:
    write(root, counts)
    write(root.parent / "val", dict.fromkeys(counts, 1), size=(21, 24))
    assert expected in odd(root, val_root=str(root.parent / "val"))


@pytest.mark.parametrize("counts", [{"cats": 9, "dogs": 2}, {"0": 3, "1": 3}, {"": 5}])
def test_ordinary_classes_are_not_odd(root: Path, counts: dict[str, int]) -> None:
    write(root, counts)
    write(root.parent / "val", dict.fromkeys(counts, 1), size=(21, 24))
    assert not odd(root, val_root=str(root.parent / "val"))


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("IMG_1.HEIC", ".heic files are left out, 1 of them; pip install pillow-heif"),
        ("scan.nii", ".nii files are left out, 1 of them; convert them"),
        ("raw.CR2", ".cr2 files are left out, 1 of them; develop them"),
        ("clip.mp4", ".mp4 files are left out, 1 of them; extract their frames"),
        ("rest.tar", ".tar files are left out, 1 of them; unpack them"),
        ("0001", "files without an ending are left out, 1 of them; give them an ending"),
    ],
)
def test_images_that_are_left_out_by_their_endings_are_odd(
    root: Path, file: str, remedy: str
) -> None:
    write(root, {"a": 4})
    (root / "a" / file).write_bytes(b"x")
    assert remedy in odd(root, suffixes=[".png"])


def test_an_image_smaller_than_a_code_is_named(root: Path) -> None:
    write(root, {"a": 8})
    paint(1).resize((5, 3)).save(root / "a" / "speck.png")
    described = odd(root, image_size=16, held_out="last")
    assert "a/speck.png of 5 x 3 pixels" not in described
    described = odd(root, image_size=[24, 40], held_out="last")
    assert (
        "a/speck.png of 5 x 3 pixels is enlarged 8 times to data.image_size=[24,40], and 1 of 9"
        in described
    )


def test_other_files_are_counted_and_not_odd(root: Path) -> None:
    write(root, {"a": 4})
    for name in ("labels.csv", "readme.txt", "a/more.txt", "Thumbs.db", ".DS_Store"):
        (root / name).write_bytes(b"x")
    described = describe(root)
    assert described["summary"]["left out"] == "2 .txt, 1 .csv, 1 .db"
    assert described["odd"] == []


def test_a_tiff_of_several_pages_is_odd_and_an_animation_is_not(root: Path) -> None:
    write(root, {"a": 4})
    for kind in ("tif", "gif"):
        paint(50).save(root / "a" / f"b.{kind}", save_all=True, append_images=[paint(51)])
    assert odd(root) == "1 of 6 images are TIFFs of several pages, of which the first alone is read"


def test_images_smaller_than_the_model_sees_are_odd(root: Path) -> None:
    write(root, {"a": 4})
    assert odd(root, image_size=64) == (
        "4 of 4 images are smaller than data.image_size=64 and are enlarged"
    )


def test_near_infrared_is_odd_and_so_is_blending_it(root: Path) -> None:
    root.mkdir()
    for i in range(4):
        image = paint(i)
        image.putalpha(paint(i + 9).getchannel("R"))
        image.save(root / f"{i}.png")
    assert odd(root).startswith("the fourth channel of 4 of 4 images is no mask")
    assert odd(root, alpha="white") == (
        "the alpha of 4 of 4 images is no mask; data.alpha=ignore leaves it out"
    )


def test_alpha_that_is_mostly_clear_or_opaque_or_has_few_levels_can_be_a_mask() -> None:
    random = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    assert not can_be_mask(random)
    assert can_be_mask(np.where(random < 200, 255, random).astype(np.uint8))
    assert can_be_mask(random // 16 * 16)


@pytest.mark.parametrize("value_range", [None, [0, 65_535]])
def test_images_that_are_black_are_odd_with_the_way_out(
    root: Path, value_range: list[int] | None
) -> None:
    root.mkdir()
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 2000, (16, 16), np.uint16)
        Image.fromarray(values).save(root / f"{i}.png")
    text = odd(root, range=value_range)
    assert ("are black, at most 7 of 255; data.range=[0,<white>]" in text) == bool(value_range)


def save_values(root: Path, values: list[NDArray[Any]]) -> None:
    """Write grey images of values as 00.tif, 01.tif ..."""
    root.mkdir()
    for i, image in enumerate(values):
        Image.fromarray(image).save(root / f"{i:02}.tif")


def test_images_of_eight_bits_among_deeper_ones_are_odd(root: Path) -> None:
    random = np.random.default_rng(0)
    deep = [random.integers(0, 4096, (16, 16), np.uint16) for _ in range(6)]
    save_values(root, [*deep, *random.integers(0, 256, (2, 16, 16), np.uint8)])
    sentence = "2 of 8 images have 8 bits, as 06.tif, and others more: 255 in them is as bright as 4,095 in the others"
    assert odd(root, held_out="last") == sentence


@pytest.mark.parametrize("hole", [np.nan, np.inf, -3.4e38])
def test_values_that_are_no_numbers_are_odd(root: Path, hole: float) -> None:
    values = np.random.default_rng(0).random((8, 16, 16), np.float32)
    values[5, :2] = hole
    save_values(root, [*values])
    assert odd(root, held_out="last") == (
        "1 of 8 images looked at have values that are no numbers or mark missing data, as 05.tif 32 of them, "
        "which are read as the lowest value of data.range"
    )


def test_a_range_for_images_of_eight_bits_is_odd(root: Path) -> None:
    write(root, {"a": 6})
    expected = "data.range=[0,100] is for images of more than 8 bits, and none has more"
    assert odd(root, range=[0, 100]) == expected
    assert odd(root, range="percentiles") == ""


def test_each_channel_names_the_values_that_it_shows(root: Path) -> None:
    root.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        planes = random.integers(0, 4096, (16, 16, 3), np.uint16)
        tifffile.imwrite(root / f"{i}.tif", planes, photometric="rgb")
    pairs = [[0, 4095], [100, 3000], [0, 9000]]
    assert describe(root, range=pairs)["summary"]["pixels"].endswith(
        "of which each channel shows 0 to 4,095, 100 to 3,000, 0 to 9,000; pixels of 16 bits"
    )


@pytest.mark.parametrize(
    ("value_range", "sentence"),
    [
        (
            [5000, 6000],
            r"^data\.range=\[5000,6000\] holds no value of 00\.tif, which has 0 to 4,\d+, nor any of 7 others looked at; "
            r"use data\.range=auto, or a range that holds them$",
        ),
        ([-10, -1], "holds no value of 00.tif"),
    ],
)
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_range_that_all_values_leave_is_refused(
    root: Path, value_range: list[int], sentence: str, cache: str
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 16, 16), np.uint16)
    values[:, 0, 0] = 0
    save_values(root, [*values])
    with pytest.raises(InputError, match=sentence):
        describe(root, range=value_range, cache=cache)
    describe(root, range=[4000, 9000], cache=cache)  # some are in it


@pytest.mark.parametrize(("low", "expected"), [(40, True), (400, False)])
def test_a_channel_that_takes_up_little_of_a_shared_range_is_odd(
    root: Path, low: int, expected: bool
) -> None:
    root.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        planes = random.integers(0, (4096, low, 4096), (16, 16, 3), np.uint16)
        tifffile.imwrite(root / f"{i}.tif", planes, photometric="rgb")
    sentence = "channel 2 of 3 takes up less than 1/64 of the range that all share, 0 to 4,095; data.range=percentiles gives"
    assert (sentence in odd(root)) == expected
    assert "takes up" not in odd(root, range="percentiles")


def test_a_range_that_all_values_of_a_channel_leave_is_refused(root: Path) -> None:
    root.mkdir()
    for i in range(4):
        planes = np.full((16, 16, 3), (10, 20, 3000 + i), np.uint16)
        tifffile.imwrite(root / f"{i}.tif", planes, photometric="rgb")
    with pytest.raises(
        InputError, match=r"^data\.range=\[0,99\] holds no value of channel 3 of 0\.tif"
    ):
        describe(root, range=[[0, 99], [0, 99], [0, 99]])


def test_images_of_one_colour_are_odd_if_they_are_many(root: Path) -> None:
    write(root, {"a": 6})
    for i in range(4):
        Image.new("L", (20 + i, 20), 40 * i).save(root / "a" / f"blank{i}.png")
    write(root.parent / "val", {"a": 2}, size=(21, 24))
    assert odd(root, val_root=str(root.parent / "val")) == (
        "4 of 10 images looked at are of one colour"
    )


def test_floats_among_whole_numbers_are_odd(root: Path) -> None:
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16), 1000 + i, np.uint16)).save(root / f"{i}.png")
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(root / "f.tif")
    assert "floating-point values and others whole numbers" in odd(root, n_val=1)


def test_a_survey_reads_headers_only_where_pixels_tell_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, {"a": 6})
    opened = []
    monkeypatch.setattr(
        "codegrid.data.survey.open_image", lambda file: opened.append(file) or open_image(file)
    )
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    source = make_images(Folder, str(root), n_val=2).source("train")
    assert len(survey_sources([source], 3).facts) == len(opened) == 4


def test_files_that_are_no_images_or_are_gone_do_not_end_a_survey(root: Path) -> None:
    write(root, {"a": 6})
    source = make_images(Folder, str(root), n_val=2, held_out="last").source("train")
    (root / "a" / "0.png").write_bytes(b"text")
    (root / "a" / "1.png").unlink()
    assert len(survey_sources([source], 3).facts) == 2
    shutil.rmtree(root)
    assert survey_sources([source], 3).facts == []


def test_a_source_without_files_has_no_facts() -> None:
    class Drawn(Source):
        def read_image(self, index: int, form: Form) -> tuple[Any, int]:
            return np.zeros(form.shape, np.uint8), 0

    assert survey_sources([Drawn(5, "drawn")], 3).facts == []
