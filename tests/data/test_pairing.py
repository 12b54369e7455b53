"""Pairs of images of two datasets, by the names of their files or by their numbers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codegrid.data.folder import Folder
from codegrid.data.pairing import pair_images, pair_names
from codegrid.data.shapes import Outlines, Shapes
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["a/1.png", "b/1.png"], ["b/1.png", "a/1.png"], [1, 0]),
        (["a/1.png", "b/1.png"], ["b/1.jpg", "a/1.jpg", "c/1.jpg"], [1, 0]),
        (["cats/1.png", "dogs/2.png"], ["2.tif", "1.tif"], [1, 0]),
        (["1.png", "2.png"], ["x/1.tif", "y/1.tif", "2.tif"], [-2, 2]),
        (["1.png", "3.png"], ["1.png", "2.png"], [0, -1]),
        (["cafe\u0301.png"], ["caf\u00e9.png"], [0]),
        (["v1.2.png"], ["v1.3.png", "v1.2.png"], [1]),
    ],
)
def test_names_are_paired_in_the_strictest_way_that_serves_all(
    names: list[str], others: list[str], expected: list[int]
) -> None:
    assert pair_names(names, others).tolist() == expected


def write_folder(folder: Path, names: list[str], seed: int, n_val: int = 3) -> Folder:
    random = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
    return make_images(
        Folder, root=str(folder), n_val=n_val, image_size=16, cache_dir=str(folder.parent / "cache")
    )


def test_images_of_folders_are_paired_across_their_splits(tmp_path: Path) -> None:
    numbers = range(12)
    photos = write_folder(tmp_path / "photos", [f"{i}.png" for i in numbers], 0)
    maps = write_folder(tmp_path / "maps", [f"{i}.bmp" for i in numbers], 1)  # other hashes
    for split, other in (("train", "val"), ("val", "train")):
        names = [str(name) for name in photos.source(split).names()]
        others = [*maps.source(split).names(), *maps.source(other).names()]
        rows = pair_images(photos, maps, split, "condition=maps")
        assert [Path(str(others[row])).stem for row in rows] == [Path(n).stem for n in names]
    in_other = pair_images(photos, maps, "val", "condition=maps") >= maps.size("val")
    assert in_other.any(), "the splits differ, or this test shows nothing"


def test_a_name_alone_does_not_stand_for_a_path_whose_partner_is_in_the_other_split(
    tmp_path: Path,
) -> None:
    """Two thirds of the maps validate, so most names without folders are unique within a split."""
    names = [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(12)]
    photos, maps = (
        write_folder(tmp_path / kind, names, seed, n_val)
        for seed, (kind, n_val) in enumerate((("photos", 3), ("maps", 16)))
    )
    for split, other in (("train", "val"), ("val", "train")):
        others = [*maps.source(split).names(), *maps.source(other).names()]
        rows = pair_images(photos, maps, split, "condition=maps")
        assert [others[row] for row in rows] == list(photos.source(split).names())


def test_images_without_a_partner_are_named(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", [f"{i}.png" for i in range(8)], 0)
    maps = write_folder(tmp_path / "maps", [f"{i}.png" for i in range(6)], 1)
    with pytest.raises(
        InputError, match="images have no partner among those of condition=runs/maps: 6.png"
    ):
        for split in ("train", "val"):
            pair_images(photos, maps, split, "condition=runs/maps")


def test_numbered_images_are_paired_if_their_numbers_mean_the_same(tmp_path: Path) -> None:
    few = {"n_train": 8, "n_val": 4, "cache_dir": str(tmp_path)}
    shapes, outlines = make_images(Shapes, **few), make_images(Outlines, **few)
    for split, n in (("train", 8), ("val", 4)):
        assert pair_images(shapes, outlines, split, "").tolist() == list(range(n))
    others = make_images(Outlines, **{**few, "seed": 1})
    with pytest.raises(InputError, match="their numbers stand for other images"):
        pair_images(shapes, others, "train", "condition=runs/outlines")
    fewer = make_images(Outlines, **{**few, "n_train": 6})
    with pytest.raises(InputError, match="2 of 8 train images have no partner"):
        pair_images(shapes, fewer, "train", "condition=runs/outlines")
