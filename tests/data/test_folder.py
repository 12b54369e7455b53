import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import InputError
from data.folder import Folder


def folder(root: Path, **settings: object) -> Folder:
    defaults: dict[str, object] = {"image_size": 16, "n_val": 4, "batch_size": 4, "cache_dir": str(root.parent / "cache")}
    return Folder(str(root), **{**defaults, **settings})  # type: ignore[arg-type]


def test_every_file_is_in_exactly_one_split(photos: Path) -> None:
    for held_out in ("random", "last"):
        files = folder(photos, held_out=held_out).files
        assert len(files["train"]) == 12
        assert sorted(files["train"] + files["val"]) == sorted(photos.rglob("*.png"))


def test_the_random_split_is_the_seeds(photos: Path) -> None:
    assert folder(photos, seed=1).files == folder(photos, seed=1).files
    assert folder(photos, seed=1).files != folder(photos, seed=2).files


def test_last_holds_out_the_last_paths(photos: Path) -> None:
    assert folder(photos, held_out="last").files["val"] == sorted(photos.rglob("*.png"))[-4:]


def test_labels_are_the_class_folders(photos: Path) -> None:
    data = folder(photos)
    assert data.split("val").labels.tolist() == [int(f.parent.name == "dogs") for f in data.files["val"]]


def test_a_flat_folder_has_one_label(photos: Path) -> None:
    assert set(folder(photos / "cats").split("train").labels) == {0}


def test_an_image_of_the_right_size_is_kept_to_the_pixel(tmp_path: Path) -> None:
    (tmp_path / "exact").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for i in range(2):
        Image.fromarray(pixels[i]).save(tmp_path / "exact" / f"{i}.png")
    data = folder(tmp_path / "exact", n_val=1, held_out="last")
    assert np.array_equal(data.split("val").values[0], pixels[1].transpose(2, 0, 1))


def test_grey_images_become_rgb_and_the_reverse(photos: Path) -> None:
    Image.new("L", (30, 20), 77).save(photos / "cats" / "grey.png")
    data = folder(photos)
    images = {
        file: image for split in ("train", "val") for file, image in zip(data.files[split], data.split(split).values, strict=True)
    }
    assert np.array_equal(images[photos / "cats" / "grey.png"], np.full((3, 16, 16), 77))
    assert folder(photos, channels=1).split("train").values.shape[1] == 1


def test_a_changed_folder_is_read_anew(photos: Path) -> None:
    before = np.array(folder(photos).split("train").values)
    target = folder(photos).files["train"][0]
    Image.new("RGB", (20, 20), (1, 2, 3)).save(target)
    os.utime(target, (1, 1))
    after = folder(photos).split("train").values
    assert after[0].max() == 3
    assert np.array_equal(before[1:], after[1:])


def test_a_broken_file_is_named(photos: Path) -> None:
    (photos / "cats" / "broken.jpg").write_bytes(b"this is no picture")
    data = folder(photos)
    with pytest.raises(InputError, match=r"broken\.jpg can't be read as an image"):
        data.prepare_data()


def test_a_broken_file_leaves_no_cache_that_looks_whole(photos: Path) -> None:
    (photos / "cats" / "broken.jpg").write_bytes(b"this is no picture")
    data = folder(photos, held_out="last", n_val=1)
    with pytest.raises(InputError):
        data.split("train")
    assert not list((photos.parent / "cache").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_val": 16}, "n_val=16 must leave both splits an image"),
        ({"held_out": "first"}, "held_out=first must be random or last"),
        ({"channels": 2}, "channels=2 must be 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(photos: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        folder(photos, **settings)


def test_an_empty_a_missing_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        folder(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="add data.root="):
        Folder(None)
