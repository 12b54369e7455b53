"""Large pictures cut into tiles."""

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from codegrid.data import regions, tiles
from codegrid.data.folder import Folder
from codegrid.data.form import Form
from codegrid.data.identity import identify_images
from codegrid.data.pieces import held_pieces
from codegrid.data.shapes import Shapes
from codegrid.data.source import FileSource
from codegrid.data.tiles import TileSource
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images

Pixels = NDArray[Any]
SHAPES = [
    (40, 70),
    (33, 64),
    (32, 32),
    (65, 50),
]  # of pictures; tiles of 16 x 16 leave something of the first two and the last
COUNTS = [8, 8, 4, 12]


@pytest.fixture(autouse=True)
def nothing_held() -> None:
    held_pieces.clear()
    regions.open_picture.cache_clear()


def draw(number: int, dtype: str = "uint8") -> Pixels:
    height, width = SHAPES[number]
    top = np.iinfo(dtype).max
    values = np.random.default_rng(number).integers(0, top, (height, width, 3)).astype(dtype)
    values[0, 0] = top
    return values


def write_tiff(path: Path, array: Pixels) -> None:
    tifffile.imwrite(
        path.with_suffix(".tif"), array, photometric="rgb", tile=(16, 16), compression="zlib"
    )


def write_array(path: Path, array: Pixels) -> None:
    np.save(path.with_suffix(".npy"), array)


def write_png(path: Path, array: Pixels) -> None:
    Image.fromarray(array).save(path.with_suffix(".png"))


Writer = Callable[[Path, Pixels], None]


def scans(root: Path, write: Writer, dtype: str = "uint8") -> Path:
    """Four pictures of other sizes, two in each class."""
    for number in range(len(SHAPES)):
        path = root / ("forest" if number < 2 else "town") / f"{number}.x"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, draw(number, dtype))
    return root


def other_picture(root: Path) -> str:
    """A folder with one picture of another content, to validate on."""
    root.mkdir()
    Image.new("RGB", (48, 48), "red").save(root / "other.png")
    return str(root)


def cut(root: Path, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {
        "image_size": 16, "tiles": 16, "n_val": 1, "batch_size": 4, "flip": False, "cache_dir": str(root.parent / "cache"),
    }  # fmt: skip
    return make_images(Folder, str(root), **{**defaults, **settings})


def all_tiles(data: Folder) -> dict[str, tuple[Pixels, int]]:
    """Pixels and label of each tile of both splits, by their names."""
    tiles = {}
    for split in ("train", "val"):
        samples, source = data.samples(split), data.source(split)
        values, labels = samples.__getitems__(list(range(len(samples))))
        names = [source.image_name(i) for i in range(len(source))]
        tiles |= dict(zip(names, zip(values.numpy(), labels.tolist(), strict=True), strict=True))
    return tiles


@pytest.mark.parametrize("write", [write_tiff, write_array, write_png])
@pytest.mark.parametrize("cache", ["disk", "ram", "none"])
def test_every_tile_has_the_pixels_of_its_place(tmp_path: Path, write: Writer, cache: str) -> None:
    data = cut(scans(tmp_path / "scans", write), cache=cache, num_workers=0)
    cut_out = all_tiles(data)
    assert len(cut_out) == sum(COUNTS)
    suffix = {write_tiff: "tif", write_array: "npy", write_png: "png"}[write]
    for number, (height, width) in enumerate(SHAPES):
        kind = "forest" if number < 2 else "town"
        for row in range(height // 16):
            for column in range(width // 16):
                pixels, label = cut_out[f"{kind}/{number}.{suffix}[{row},{column}]"]
                part = draw(number)[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                np.testing.assert_array_equal(pixels, part.transpose(2, 0, 1))
                assert data.classes[label] == kind


@pytest.mark.parametrize("write", [write_tiff, write_array])
def test_tiles_of_16_bits_keep_them(tmp_path: Path, write: Writer) -> None:
    data = cut(scans(tmp_path / "scans", write, "uint16"))
    assert (data.rules.depth, data.rules.scaled_ranges) == (16, ((0, 65535),))
    for name, (pixels, _) in all_tiles(data).items():
        if "/2." in name and name.endswith("[1,0]"):
            np.testing.assert_array_equal(pixels, draw(2, "uint16")[16:, :16].transpose(2, 0, 1))


def test_whole_files_are_held_out(tmp_path: Path) -> None:
    data = cut(scans(tmp_path / "scans", write_tiff), n_val=2)
    files = {}
    for split in ("train", "val"):
        source = data.source(split)
        assert isinstance(source, TileSource)
        files[split] = {source.image_name(i).partition("[")[0] for i in range(len(source))}
    assert len(files["val"]) == len(files["train"]) == 2
    assert not files["train"] & files["val"]


@pytest.mark.parametrize("write", [write_tiff, write_png])
def test_reader_processes_give_the_same_batches(tmp_path: Path, write: Writer) -> None:
    root = scans(tmp_path / "scans", write)
    batches = []
    for settings in ({"cache": "disk"}, {"cache": "none", "num_workers": 2}):
        data = cut(root, **settings)
        loader = data.train_dataloader()
        batches.append([(images.numpy(), labels.numpy()) for images, labels in islice(loader, 8)])
    for (images, labels), (others, other_labels) in zip(*batches, strict=True):
        np.testing.assert_array_equal(images, others)
        np.testing.assert_array_equal(labels, other_labels)


def test_tiles_may_be_rectangles_and_larger_than_the_image(tmp_path: Path) -> None:
    data = cut(scans(tmp_path / "scans", write_tiff), tiles=[32, 24], image_size=[16, 12])
    assert sum(len(data.source(split)) for split in ("train", "val")) == 2 + 2 + 1 + 4
    images, _ = data.take_evenly("train", 2)
    assert images.shape == (2, 3, 16, 12)
    whole = data.source("train").read_image(0, Form((32, 24), 3))[0]
    small = data.source("train").read_image(0, Form((16, 12), 3))[0]
    resized = Image.fromarray(whole.transpose(1, 2, 0)).resize((12, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small, np.asarray(resized).transpose(2, 0, 1))


def test_random_crops_are_cut_out_of_tiles(tmp_path: Path) -> None:
    data = cut(scans(tmp_path / "scans", write_tiff), tiles=18, crop="random", resize=18)
    images = next(iter(data.train_dataloader()))[0]
    assert images.shape[-2:] == (18, 18)
    assert data.augment(images).shape[-2:] == (16, 16)
    with pytest.raises(
        InputError, match=r"data\.tiles=16 is smaller than the 18 pixels that each tile"
    ):
        cut(tmp_path / "scans", tiles=16, crop="random")


def test_a_picture_smaller_than_a_tile_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = scans(tmp_path / "scans", write_tiff)
    message = r"forest/1\.tif can't be read as an image \(64 x 33 pixels, less than a tile of data\.tiles=40\)"
    val = other_picture(tmp_path / "val")
    with pytest.raises(InputError, match=message):
        all_tiles(cut(root, tiles=40, val_root=val))
    data = cut(root, tiles=40, on_error="skip", val_root=val)
    files = {name.partition("[")[0] for name in all_tiles(data)}
    assert files == {"forest/0.tif", "town/3.tif", "other.png"}
    assert (
        "2 of 4 pictures of scans-train are left out: forest/1.tif (64 x 33 pixels"
        in capsys.readouterr().err
    )
    with pytest.raises(
        InputError,
        match="none of the 4 pictures of scans-train can be cut into tiles: forest/0.tif",
    ):
        all_tiles(cut(root, tiles=400, on_error="skip", val_root=val))


def test_a_picture_whose_header_is_damaged_is_named(tmp_path: Path) -> None:
    root = scans(tmp_path / "scans", write_png)
    (root / "town" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError, match=r"town/2\.png can't be read as an image"):
        all_tiles(cut(root))
    assert len(all_tiles(cut(root, on_error="skip"))) == sum(COUNTS) - COUNTS[2]


def test_a_picture_that_breaks_later_is_left_out_tile_by_tile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = scans(tmp_path / "scans", write_png)
    content = (root / "town" / "3.png").read_bytes()
    (root / "town" / "3.png").write_bytes(content[: len(content) // 2])
    data = cut(root, on_error="skip", val_root=other_picture(tmp_path / "val"))
    assert data.size("train") == sum(COUNTS) - COUNTS[3]
    assert (
        "12 of 32 train images can't be read and are left out: town/3.png[0,0]"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("n_val", "message"),
    [
        (
            1000,
            r"data\.n_val=1000 of 4 pictures: with data\.tiles whole pictures validate.*use data\.n_val=1, or",
        ),
        (4, r"data\.n_val=4 of 4 pictures"),
    ],
)
def test_the_number_held_out_is_one_of_pictures(tmp_path: Path, n_val: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut(scans(tmp_path / "scans", write_tiff), n_val=n_val)


def test_a_recorded_boundary_decides_whatever_is_left_of_the_pictures(tmp_path: Path) -> None:
    root = scans(tmp_path / "scans", write_tiff)
    first = cut(root, n_val=2)
    split_at = first.decisions()["split_at"]
    trained = {first.source("train").image_name(i) for i in range(first.size("train"))}
    (root / sorted(trained)[0].partition("[")[0]).unlink()
    second = cut(root, n_val=3, split_at=split_at)
    left = {second.source("train").image_name(i) for i in range(second.size("train"))}
    assert left < trained


def test_a_single_picture_cannot_be_both_splits(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    write_tiff(tmp_path / "scans" / "a.x", draw(0))
    with pytest.raises(
        InputError,
        match=r"of 1 picture: .*add another, or split it into two, or name a folder of others",
    ):
        cut(tmp_path / "scans")
    (tmp_path / "val").mkdir()
    write_tiff(tmp_path / "val" / "b.x", draw(1))
    data = cut(tmp_path / "scans", val_root=str(tmp_path / "val"))
    assert [data.size(split) for split in ("train", "val")] == COUNTS[:2]


def test_only_files_are_cut(tmp_path: Path) -> None:
    data = make_images(Shapes, n_train=8, n_val=4, image_size=16, tiles=16, cache_dir=str(tmp_path))
    with pytest.raises(
        InputError, match=r"data\.tiles cuts image files into tiles, and these images are none"
    ):
        data.source("train")


@pytest.mark.parametrize("setting", [0, -1, "x", [1, 2, 3], 1.5, True])
def test_a_size_that_is_none_is_refused(tmp_path: Path, setting: Any) -> None:
    with pytest.raises(InputError, match=r"data\.tiles="):
        cut(scans(tmp_path / "scans", write_tiff), tiles=setting)


def test_sizes_are_read_from_headers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = scans(tmp_path / "scans", write_tiff)
    first = [len(cut(root).source(split)) for split in ("train", "val")]
    monkeypatch.setattr(tiles, "measure_picture", lambda *_: pytest.fail("measured again"))
    assert [len(cut(root).source(split)) for split in ("train", "val")] == first


def test_with_cache_ram_nothing_is_written(tmp_path: Path) -> None:
    all_tiles(cut(scans(tmp_path / "scans", write_tiff), cache="ram"))
    assert not list((tmp_path / "cache").glob("*size*"))


def test_the_tile_is_part_of_what_is_cached(tmp_path: Path) -> None:
    root = scans(tmp_path / "scans", write_tiff)
    keys = [str(cut(root, tiles=tile).cache_key("train")) for tile in (16, 32)]
    assert keys[0] != keys[1]
    hashes = [identify_images(cut(root, tiles=tile, n_val=1))["train"] for tile in (16, 32)]
    assert hashes[0] != hashes[1]


def test_without_tiles_nothing_changes(tmp_path: Path) -> None:
    data = cut(scans(tmp_path / "scans", write_tiff), tiles=None)
    assert isinstance(data.source("train"), FileSource)
    assert set(data.cache_key("train")["source"]) == {"root", "files"}


def test_a_copy_elsewhere_has_the_same_tiles(tmp_path: Path) -> None:
    here, there = (cut(scans(tmp_path / place / "scans", write_tiff)) for place in ("a", "b"))
    assert identify_images(here) == identify_images(there)
    ids = here.source("train").image_ids()
    assert len(set(ids.tolist())) == len(ids)


def test_a_whole_picture_is_decoded_once_while_the_cache_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cut(scans(tmp_path / "scans", write_png))
    decoded: list[str] = []
    plain = regions.decode
    monkeypatch.setattr(regions, "decode", lambda *args: (decoded.append(""), plain(*args))[1])
    all_tiles(data)
    assert len(decoded) == len(SHAPES)


def test_pictures_that_are_decoded_whole_are_shards(tmp_path: Path) -> None:
    data = cut(scans(tmp_path / "a" / "scans", write_png))
    shards = [data.source(split).shard_sizes or [] for split in ("train", "val")]
    assert sorted(shards[0] + shards[1]) == sorted(COUNTS)
    assert cut(scans(tmp_path / "b" / "scans", write_tiff)).source("train").shard_sizes is None


def test_a_source_of_tiles_travels_to_other_processes(tmp_path: Path) -> None:
    source = cut(scans(tmp_path / "scans", write_tiff)).source("train")
    source.read_image(0, Form((16, 16), 3))
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(
        copy.read_image(3, Form((16, 16), 3))[0], source.read_image(3, Form((16, 16), 3))[0]
    )


@pytest.mark.parametrize("write", [write_tiff, write_png])
def test_the_summary_says_what_the_tiles_are_of(tmp_path: Path, write: Writer) -> None:
    data = cut(scans(tmp_path / "scans", write))
    summary = data.describe()["summary"]
    total = sum(height * width for height, width in SHAPES)
    outside = 1 - sum(COUNTS) * 256 / total
    text = (
        f"32 of 16 x 16 pixels out of 4 pictures of 32 x 32 to 50 x 65; {outside:.1%} of the pixels, "
        "at right and lower borders, are in none"
    )
    if write is write_png:
        text += "; 4 pictures have to be decoded whole"
    assert summary["tiles"] == text
    assert "sizes" not in summary
    assert summary["pixels"].startswith("8-bit RGB")


def test_the_range_is_that_of_the_tiles(tmp_path: Path) -> None:
    root = scans(
        tmp_path / "scans", lambda path, array: write_array(path, array.astype("int16") - 100)
    )
    data = cut(root)
    assert data.rules.scaled_ranges == ((-128, 255),)
    assert all_tiles(data)


def test_a_file_that_became_shorter_is_an_unreadable_image(tmp_path: Path) -> None:
    root = scans(tmp_path / "scans", write_array)
    data = cut(root, cache="none", num_workers=0, on_error="skip")
    assert data.size("train")
    for file in root.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    _, _, faults = data.source("train").read_batch([0], Form((16, 16), 3))
    assert faults == {0: "the file is shorter than its header says"}


def test_tiles_have_the_labels_and_columns_that_a_table_gives_their_files(tmp_path: Path) -> None:
    root = scans(tmp_path / "scans", write_tiff)
    rows = [
        f"{'forest' if n < 2 else 'town'}/{n}.tif,{'dry' if n % 2 else 'wet'},{n + 0.5}"
        for n in range(4)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file,weather,height", *rows]) + "\n")
    settings = {"labels": str(tmp_path / "labels.csv"), "label": "weather", "columns": ["height"]}
    data = cut(root, **settings)
    assert data.classes == ["dry", "wet"]
    for split in ("train", "val"):
        source = data.source(split)
        numbers = [
            int(source.image_name(i).split("/")[1].partition(".")[0]) for i in range(len(source))
        ]
        assert [data.classes[label] for label in data.samples(split).labels] == [
            ("wet", "dry")[n % 2] for n in numbers
        ]
        np.testing.assert_allclose(data.columns(split)["height"], np.array(numbers) + 0.5)
