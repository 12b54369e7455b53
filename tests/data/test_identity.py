"""A run records which images it was trained on; other images are noticed, a copy in another place is not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.folder import Folder, open_class_folders
from codegrid.data.identity import (
    ImageList,
    check_same_images,
    compare_images,
    identify_images,
    identify_pixels,
    read_image_lists,
    save_image_ids,
)
from codegrid.data.shapes import Shapes
from codegrid.data.source import SourceSubset
from codegrid.data.store import fingerprint
from codegrid.engine.errors import InputError
from codegrid.engine.folder import IMAGES, append_record
from tests.helpers.images import make_images


def open_folder(root: Path, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {"image_size": 16, "n_val": 4, "held_out": "last", "batch_size": 4}
    cache = str(root.parent / "cache")
    return make_images(Folder, str(root), **{**defaults, "cache_dir": cache, **settings})


def record(images: ImageDataModule, folder: Path) -> Path:
    """A run folder with what a run on these images records of them."""
    folder.mkdir(exist_ok=True)
    append_record(folder, {}, images.describe())
    save_image_ids(images, folder)
    return folder


def paint(file: Path, grey: int = 0) -> None:
    Image.new("L", (20, 24), grey).save(file)


def copy_elsewhere(photos: Path) -> Path:
    """A copy in a folder of another name, with other times."""
    copy = photos.parent / "elsewhere" / "pictures"
    shutil.copytree(photos, copy, copy_function=shutil.copyfile)
    for file in copy.rglob("*.png"):
        os.utime(file, (1, 1))
    return copy


def test_a_copy_in_another_place_has_the_same_images(photos: Path) -> None:
    copy = copy_elsewhere(photos)
    assert identify_images(open_folder(copy)) == identify_images(open_folder(photos))
    assert open_folder(copy).cache_key("train") != open_folder(photos).cache_key("train")


def test_letters_with_accents_are_the_same_in_both_forms_of_writing(photos: Path) -> None:
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    paint(photos / "cats" / composed)
    before = open_class_folders(photos).image_ids()
    (photos / "cats" / composed).rename(photos / "cats" / decomposed)
    assert np.array_equal(before, open_class_folders(photos).image_ids())


def shorten(photos: Path) -> None:
    """Another size, the same name."""
    paint(photos / "cats" / "3.png")


def rewrite(photos: Path) -> None:
    """Another content of the same size."""
    file = photos / "dogs" / "1.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def rename(photos: Path) -> None:
    (photos / "cats" / "3.png").rename(photos / "cats" / "33.png")


def relabel(photos: Path) -> None:
    (photos / "dogs" / "1.png").rename(photos / "cats" / "11.png")


def remove(photos: Path) -> None:
    (photos / "cats" / "3.png").unlink()


def add(photos: Path) -> None:
    paint(photos / "cats" / "new.png")


SAME_NAME = "train has 12 images (1 of the same name with another content)"
CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (shorten, SAME_NAME),
    (rewrite, SAME_NAME),
    (rename, f"train has 12 images (1 added, as {Path('cats', '33.png')}; 1 missing)"),
    (remove, "train has 11 instead of 12 images (1 missing)"),
    (add, f"train has 13 instead of 12 images (1 added, as {Path('cats', 'new.png')})"),
]


@pytest.mark.parametrize(
    ("change", "expected"), CHANGES, ids=lambda case: getattr(case, "__name__", "")
)
def test_a_change_is_described(
    photos: Path, tmp_path: Path, change: Callable[[Path], None], expected: str
) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    assert compare_images(open_folder(photos), folder) is None
    change(photos)
    assert str(compare_images(open_folder(photos), folder)) == expected


def test_images_that_change_sides_are_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    (photos / "dogs" / "7.png").unlink()  # so that dogs/3.png, which was trained on, validates
    check_same_images(open_folder(photos), folder)
    assert capsys.readouterr().err == (
        f"the images are not those that {folder} was trained on: train has 11 instead of 12 images, "
        "val has 4 images (1 missing; 1 trained before, so that their scores are too good)\n"
    )


def test_equal_names_in_two_folders_are_two_images(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "held")
    for grey, file in enumerate((tmp_path / "held").rglob("*.png")):
        paint(file, grey)
    settings = {"val_root": str(tmp_path / "held"), "n_val": 0}
    folder = record(open_folder(photos, **settings), tmp_path / "run")
    paint(tmp_path / "held" / "cats" / "new.png", 99)
    change = compare_images(open_folder(photos, **settings), folder)
    assert str(change) == (
        f"val has 17 instead of 16 images (1 added, as {Path('cats', 'new.png')})"
    )


def test_an_added_copy_that_validates_counts_as_trained_on(photos: Path, tmp_path: Path) -> None:
    """cats/0.png was trained on; its copy comes last, is held out, and takes the original out of training."""
    folder = record(open_folder(photos), tmp_path / "run")
    shutil.copy(photos / "cats" / "0.png", photos / "dogs" / "8.png")
    change = compare_images(open_folder(photos), folder)
    assert change is not None
    assert "1 copies of images that trained before, so that their scores are too good" in str(
        change
    )


def test_a_copy_that_was_never_trained_on_does_not_count(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "dogs" / "7.png", photos / "cats" / "8.png")
    folder = record(open_folder(photos), tmp_path / "run")
    add(photos)
    change = compare_images(open_folder(photos), folder)
    assert change is not None
    assert "too good" not in str(change)


def test_the_same_names_with_other_labels_are_other_images(photos: Path, tmp_path: Path) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    images = open_folder(photos)
    images.source("train").content_key = {"labels": "others"}
    assert "with other contents or labels" in str(compare_images(images, folder))


def test_a_run_resumes_on_a_folder_that_grew_but_not_on_other_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    add(photos)
    check_same_images(open_folder(photos), folder, resumes=True)
    assert "1 added" in capsys.readouterr().err
    for grey, file in enumerate(photos.rglob("*.png")):
        paint(file, grey)
    with pytest.raises(InputError, match="with another content.*say where its own images are"):
        check_same_images(open_folder(photos), folder, resumes=True)


def test_images_of_before_stay_in_the_list_when_a_run_resumes(photos: Path, tmp_path: Path) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    before = read_image_lists(folder)["train"].ids
    remove(photos)
    save_image_ids(open_folder(photos), folder)
    assert set(read_image_lists(folder)["train"].ids.tolist()) == set(before.tolist())


def test_images_that_a_resumed_run_was_trained_on_before_are_reported_by_every_later_command(
    photos: Path, tmp_path: Path
) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    (photos / "dogs" / "7.png").unlink()
    record(open_folder(photos), folder)  # as resumed
    assert str(compare_images(open_folder(photos), folder)) == (
        "val has 4 images (1 trained before, so that their scores are too good)"
    )


def test_a_run_without_a_list_tells_the_numbers(photos: Path, tmp_path: Path) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    (folder / IMAGES).unlink()
    shorten(photos)
    assert str(compare_images(open_folder(photos), folder)) == (
        "train has 12 images (with other contents or labels, or in another order)"
    )


def test_a_run_of_an_earlier_version_is_compared_as_far_as_its_record_goes(
    photos: Path, tmp_path: Path
) -> None:
    images = open_folder(photos)
    folder = tmp_path / "run"
    folder.mkdir()
    keys = [images.cache_key(split) for split in ("train", "val")]
    append_record(folder, {}, {"title": "x", "train": 12, "val": 4, "hash": fingerprint(keys)})
    assert compare_images(open_folder(copy_elsewhere(photos)), folder) is None
    add(photos)
    assert "train has 13 instead of 12 images" in str(compare_images(open_folder(photos), folder))


def test_a_run_without_a_record_is_not_compared(photos: Path, tmp_path: Path) -> None:
    assert compare_images(open_folder(photos), tmp_path) is None
    check_same_images(open_folder(photos), None)


def test_other_shapes_are_other_images(tmp_path: Path) -> None:
    folder = record(make_images(Shapes, n_train=8, n_val=4, cache="ram"), tmp_path / "run")
    assert compare_images(make_images(Shapes, n_train=8, n_val=4, cache="ram"), folder) is None
    other = make_images(Shapes, n_train=8, n_val=4, cache="ram", seed=1)
    assert compare_images(other, folder) is not None


def test_a_subset_is_known_by_its_own_images(photos: Path) -> None:
    whole = open_class_folders(photos)
    rows = np.array([1, 5])
    kinds = ImageList.of(SourceSubset(whole, rows)), ImageList.of(whole.subset(rows))
    assert kinds[0].hash(None) == kinds[1].hash(None)


def test_a_named_pipe_is_not_opened(photos: Path) -> None:
    os.mkfifo(photos / "cats" / "pipe.png")
    files = open_class_folders(photos)
    assert len(ImageList.of(files).digests) == 17


def test_what_a_model_sees_is_known_by_the_images_and_how_they_are_cut(photos: Path) -> None:
    seen_here = identify_pixels(open_folder(photos), "train")
    assert identify_pixels(open_folder(copy_elsewhere(photos)), "train") == seen_here
    for settings in ({"image_size": 8}, {"channels": 1}, {"resize": 18}):
        assert identify_pixels(open_folder(photos, **settings), "train") != seen_here


@pytest.mark.parametrize("content", [b"", b"half of a zip", b"PK\x03\x04"])
def test_a_damaged_list_ends_no_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    folder = record(open_folder(photos), tmp_path / "run")
    (folder / IMAGES).write_bytes(content)
    remove(photos)
    check_same_images(open_folder(photos), folder, resumes=True)
    printed = capsys.readouterr().err
    assert f"{folder / IMAGES} is damaged" in printed
    assert "train has 11 instead of 12 images" in printed


def test_a_list_that_cant_be_written_ends_no_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image_ids(open_folder(photos), tmp_path / "gone")
    assert "images.npz can't be written" in capsys.readouterr().err


def test_unreadable_images_that_were_skipped_are_no_difference(
    photos: Path, tmp_path: Path
) -> None:
    (photos / "cats" / "3.png").write_bytes(b"not an image")
    folder = record(open_folder(photos, on_error="skip"), tmp_path / "run")
    assert compare_images(open_folder(photos, on_error="skip"), folder) is None
