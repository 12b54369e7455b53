import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.endings import IMAGE_SUFFIXES
from codegrid.data.folder import Folder, find_images, open_class_folders
from codegrid.data.form import Form
from codegrid.data.labels import SORTED
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images

Pixels = NDArray[np.uint8]


def folder(root: Path, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {
        "image_size": 16,
        "n_val": 4,
        "batch_size": 4,
        "cache_dir": str(root.parent / "cache"),
    }
    return make_images(Folder, str(root), **{**defaults, **settings})


def names(data: Folder, split: str) -> list[str]:
    """The files of a split, including unreadable ones."""
    source = data.source(split)
    return [Path(source.image_name(i)).as_posix() for i in range(len(source))]


def images(data: Folder, split: str) -> dict[str, Pixels]:
    """The pixels that a split gives for each of its readable files."""
    samples = data.samples(split)
    values, _ = samples.__getitems__(list(range(len(samples))))
    rows = range(len(samples)) if samples.rows is None else samples.rows
    return {names(data, split)[row]: value.numpy() for row, value in zip(rows, values, strict=True)}


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(root: Path, *files: str) -> None:
    """Write images, each with its own noise."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(20, 24, seed=zlib.crc32(file.encode()))).save(root / file)


def sixteen_bits(file: Path) -> Pixels:
    """Write an RGB PNG with 16 bits per channel, which Pillow cannot write; returns the upper eight bits."""
    values = np.random.default_rng(1).integers(0, 2**16, (16, 16, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return (values >> 8).astype(np.uint8)


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    """A folder with one file of each unreadable kind."""
    root = tmp_path / "wild"
    root.mkdir()
    (root / "cut.jpg").write_bytes(_half(Image.fromarray(noise(60, 60)), "JPEG"))
    (root / "cut.png").write_bytes(_half(Image.fromarray(noise(60, 60)), "PNG"))
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "empty.png").write_bytes(b"")
    Image.new("F", (16, 16), float("nan")).save(root / "float.tif")
    os.mkfifo(root / "pipe.jpg")
    (root / "text.jpg").write_text("this is no picture")
    return root


UNREADABLE = {
    "cut.jpg": "image file is truncated",
    "cut.png": "image file is truncated",
    "dangling.jpg": "No such file or directory",
    "empty.png": "empty file",
    "float.tif": "no pixel is a number",
    "pipe.jpg": "empty file",
    "text.jpg": "no image of a known format",
}


def _half(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()[: buffer.tell() // 2]


def readable(root: Path) -> dict[str, Pixels]:
    """Write one file of each odd but readable kind; returns the pixels (16, 16, 3) that each should give.

    huge.png has 12000 x 9000 pixels in 72 kB: 5000 black rows above 4000 white ones.
    """
    plain = noise(16, 16)
    clear = plain[:, :, 0] < 128
    blobs = Image.fromarray(noise(4, 4)).resize((16, 16), Image.Resampling.BICUBIC)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    expected = {"rgb16.png": sixteen_bits(root / "rgb16.png")}

    turn = Image.Exif()
    turn[0x0112] = 6  # portrait: the first row is the right side
    Image.fromarray(plain).save(root / "exif.jpg", exif=turn)
    expected["exif.jpg"] = np.rot90(np.asarray(Image.open(root / "exif.jpg")), -1)

    values = np.random.default_rng(2).integers(0, 2**16, (16, 16), np.uint16)
    Image.fromarray(values).save(root / "grey16.png")
    expected["grey16.png"] = np.repeat((values // 256).astype(np.uint8)[..., None], 3, 2)

    palette = Image.fromarray(clear.astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(root / "palette.png", transparency=1)
    expected["palette.png"] = np.where(clear[..., None], 255, [10, 20, 30]).astype(np.uint8)

    Image.fromarray(np.dstack([plain, np.where(clear, 0, 255)]).astype(np.uint8)).save(
        root / "alpha.png"
    )
    expected["alpha.png"] = np.where(clear[..., None], 255, plain).astype(np.uint8)

    blobs.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    expected["cmyk.jpg"] = np.asarray(blobs)

    for kind, settings in (("gif", {}), ("webp", {"lossless": True})):
        frames[0].save(
            root / f"animated.{kind}", save_all=True, append_images=frames[1:], **settings
        )
        expected[f"animated.{kind}"] = np.asarray(frames[0])

    Image.new("RGB", (1, 1), (9, 8, 7)).save(root / "pixel.png")
    expected["pixel.png"] = np.full((16, 16, 3), [9, 8, 7], np.uint8)

    bits = bytes(1500 * 5000) + b"\xff" * (1500 * 4000)
    Image.frombytes("1", (12_000, 9_000), bits).save(root / "huge.png", compress_level=1)
    return expected


def test_readable_files_are_decoded_and_unreadable_ones_are_named_and_counted(
    wild: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = readable(wild)
    save(wild, "zz.png")  # the last, for validation
    decoded = images(folder(wild, n_val=1, held_out="last", on_error="skip"), "train")
    huge = decoded.pop("huge.png")
    # There are greys between the black and the white band.
    assert (set(huge[:, :7].flat), set(huge[:, 11:].flat)) == ({0}, {255})
    assert decoded.keys() == expected.keys()
    for name, pixels in expected.items():
        off = np.abs(decoded[name].transpose(1, 2, 0).astype(int) - pixels)
        assert off.max() <= (8 if name == "cmyk.jpg" else 0), name  # CMYK is rounded
    report = capsys.readouterr().err
    assert f"7 of {8 + len(expected)} train images can't be read and are left out: " in report
    assert "cut.jpg (image file is truncated" in report
    assert "dangling.jpg (No such file or directory)" in report
    assert report.rstrip().endswith("and 2 more")


@pytest.mark.parametrize("name", UNREADABLE)
def test_each_unreadable_file_is_named_with_its_reason(
    wild: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in UNREADABLE.keys() - {name}:
        (wild / other).unlink()
    save(wild, "a.png", "zz.png")
    data = folder(wild, n_val=1, held_out="last", on_error="skip")
    assert list(images(data, "train")) == ["a.png"]
    report = capsys.readouterr().err
    assert (
        f"1 of 2 train images can't be read and are left out: {name} ({UNREADABLE[name]}" in report
    )


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_stop_names_the_first_unreadable_file_and_the_way_out(wild: Path, cache: str) -> None:
    save(wild, "a.png", "zz.png")
    data = folder(wild, n_val=1, held_out="last", cache=cache)
    with pytest.raises(
        InputError,
        match=r"^cut\.jpg can't be read as an image \(image file is.*data\.on_error=skip$",
    ):
        data.prepare_data()


def test_a_folder_that_was_read_with_skip_stops_with_stop(wild: Path) -> None:
    save(wild, "a.png", "zz.png")
    folder(wild, n_val=1, held_out="last", on_error="skip").samples("train")
    with pytest.raises(InputError, match=r"cut\.jpg can't be read"):
        folder(wild, n_val=1, held_out="last").samples("train")


def test_stop_leaves_no_cache_that_looks_whole(wild: Path) -> None:
    save(wild, "a.png", "zz.png")
    with pytest.raises(InputError):
        folder(wild, n_val=1, held_out="last").samples("train")
    assert not list((wild.parent / "cache").glob("wild-*"))
    assert not list((wild.parent / "cache").glob(".wild-*.part"))


def test_folders_of_nothing_but_unreadable_files_are_refused(wild: Path) -> None:
    data = folder(wild, n_val=1, on_error="skip")
    with pytest.raises(InputError, match="none of the 6 train images of wild can be read"):
        data.samples("train")


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_left_out_files_are_logged_in_every_run(
    wild: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(wild, "a.png", "zz.png")
    for _ in range(2):
        folder(wild, n_val=1, held_out="last", on_error="skip", cache=cache).samples("train")
        assert "7 of 8 train images can't be read and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_second_run_does_not_read_everything_again(
    photos: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(photos, cache=cache).prepare_data()
    monkeypatch.setattr(
        "codegrid.data.source.FileSource.read_image", None
    )  # a second reading would fail
    folder(photos, cache=cache).prepare_data()


def test_images_that_break_during_a_run_do_not_end_it(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(photos, n_val=8, held_out="last", cache="none", num_workers=0)
    whole, labels = data.samples("val").__getitems__(range(8))
    (photos / "dogs" / "1.png").unlink()
    (photos / "dogs" / "2.png").write_text("overwritten")
    batches = [batch for _ in range(2) for batch in data.val_dataloader()]
    assert [len(x) for x, _ in batches] == [4] * 4
    assert np.array_equal(
        batches[0][0], whole[[0, 0, 3, 3]]
    )  # other images of the batch replace them
    assert np.array_equal(batches[0][1], labels[[0, 0, 3, 3]])
    report = capsys.readouterr().err
    assert (
        report.count(
            f"{Path('dogs', '1.png')} can't be read (No such file or directory); another image takes its place"
        )
        == 1
    )
    assert report.count(f"{Path('dogs', '2.png')} can't be read (no image of a known format)") == 1


def test_a_disk_that_is_gone_ends_the_run_in_one_sentence(photos: Path) -> None:
    data = folder(photos, cache="none", num_workers=0)
    data.prepare_data()
    shutil.rmtree(photos)
    with pytest.raises(
        InputError,
        match=r"can't be read \(No such file or directory\), nor the 64 after it; is the disk still there\?$",
    ):
        next(iter(data.train_dataloader()))


def test_every_file_is_in_exactly_one_split(photos: Path) -> None:
    for held_out in ("random", "last"):
        data = folder(photos, held_out=held_out)
        assert len(names(data, "train")) == 12
        assert sorted(names(data, "train") + names(data, "val")) == [
            f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(8)
        ]


def test_the_random_split_is_the_split_seeds_and_not_the_seeds(photos: Path) -> None:
    first, again, other = (names(folder(photos, split_seed=seed), "val") for seed in (0, 0, 1))
    assert first == again != other
    assert names(folder(photos, seed=7), "val") == first


def test_without_a_split_seed_the_split_is_that_of_earlier_versions(photos: Path) -> None:
    for seed in (1, 2):
        order = np.random.default_rng(seed).permutation(16)
        expected = sorted(int(row) for row in order[-4:])
        whole = open_class_folders(photos)
        data = folder(photos, split_seed=None, seed=seed)
        assert names(data, "val") == [whole.image_name(row) for row in expected]
        assert "split_at" not in data.decisions()


def test_the_boundary_of_a_run_keeps_every_file_of_a_grown_folder_on_its_side(photos: Path) -> None:
    for held_out in ("random", "last"):
        before = folder(photos, held_out=held_out)
        decided = {"split_at": before.decisions()["split_at"]}
        save(photos, *(f"{kind}/new-{i}.png" for kind in ("ants", "cats") for i in range(40)))
        shutil.rmtree(photos / "dogs" / "0.png", ignore_errors=True)
        after = folder(photos, held_out=held_out, **decided)
        for split in ("train", "val"):
            old = {name for name in names(after, split) if "new" not in name}
            assert old == {name for name in names(before, split) if "new" not in name}
        assert after.decisions()["split_at"] == decided["split_at"]


def test_a_boundary_without_a_split_seed_is_refused(photos: Path) -> None:
    with pytest.raises(InputError, match=r"data\.split_at=0\.5 needs a data\.split_seed"):
        folder(photos, split_at=0.5, split_seed=None)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "a"])
def test_a_split_seed_that_is_no_whole_number_is_refused(photos: Path, seed: Any) -> None:
    with pytest.raises(InputError, match=f"data.split_seed={seed} must be a whole number"):
        folder(photos, split_seed=seed)


def test_last_holds_out_the_last_paths(photos: Path) -> None:
    assert names(folder(photos, held_out="last"), "val") == [f"dogs/{i}.png" for i in range(4, 8)]


def test_labels_are_the_class_folders(photos: Path) -> None:
    data = folder(photos)
    _, labels = data.samples("val").__getitems__(range(4))
    assert data.classes == ["cats", "dogs"]
    assert [data.classes[label] for label in labels] == [
        name.split("/")[0] for name in names(data, "val")
    ]


def test_a_class_is_the_first_folder_however_deep_the_image_lies(tmp_path: Path) -> None:
    save(tmp_path, "birds/a.png", "birds/far/below/b.png", "fish/cats/c.png")
    assert open_class_folders(tmp_path).labels == [0, 0, 1]


def test_a_flat_folder_has_one_label(photos: Path) -> None:
    assert set(open_class_folders(photos / "cats").labels) == {0}


def test_an_image_of_the_right_size_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "exact").mkdir()
    for i in range(2):
        Image.fromarray(noise(16, 16, seed=i)).save(tmp_path / "exact" / f"{i}.png")
    data = folder(tmp_path / "exact", n_val=1, held_out="last")
    assert np.array_equal(images(data, "val")["1.png"], noise(16, 16, seed=1).transpose(2, 0, 1))


def test_grey_images_become_rgb_and_rgb_images_grey(photos: Path) -> None:
    Image.new("L", (30, 20), 77).save(photos / "cats" / "grey.png")
    data = folder(photos, held_out="last")
    assert np.array_equal(images(data, "train")["cats/grey.png"], np.full((3, 16, 16), 77))
    assert folder(photos, channels=1).samples("train").values.shape[1] == 1


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_a_changed_folder_is_read_again(photos: Path, cache: str) -> None:
    before = images(folder(photos, cache=cache), "train")
    target = next(iter(before))
    Image.new("RGB", (20, 20), (1, 2, 3)).save(photos / target)
    os.utime(photos / target, (1, 1))
    after = images(folder(photos, cache=cache), "train")
    assert after.pop(target).max() == 3
    assert all(np.array_equal(after[name], before[name]) for name in after)


def test_other_settings_are_another_cache(photos: Path) -> None:
    folder(photos).samples("val")
    assert folder(photos, image_size=8).samples("val").values.shape == (4, 3, 8, 8)
    assert folder(photos, channels=1).samples("val").values.shape == (4, 1, 16, 16)


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_cycle_of_links_ends_and_gives_each_image_once(tmp_path: Path, target: str) -> None:
    save(tmp_path, "root/a/b/1.png", "root/a/2.png")
    (tmp_path / "root" / "a" / "b" / "loop").symlink_to(target)
    assert find_images(tmp_path / "root") == [
        tmp_path / "root/a/2.png",
        tmp_path / "root/a/b/1.png",
    ]


def test_two_folders_that_link_to_each_other_end_too(tmp_path: Path) -> None:
    save(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    assert sorted(path.name for path in find_images(tmp_path)) == ["1.png", "2.png"]


def test_a_linked_class_folder_is_followed(tmp_path: Path) -> None:
    save(tmp_path, "root/cats/1.png", "elsewhere/2.png")
    (tmp_path / "root" / "dogs").symlink_to(tmp_path / "elsewhere")
    files = open_class_folders(tmp_path / "root")
    assert files.classes == ["cats", "dogs"]
    assert files.read_image(1, Form.square(8, 3))[1] == 1


def test_a_linked_image_is_read(tmp_path: Path) -> None:
    save(tmp_path, "elsewhere/1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert open_class_folders(tmp_path / "root").read_image(0, Form.square(8, 3))[0].shape == (
        3,
        8,
        8,
    )


def test_a_link_next_to_its_target_does_not_take_its_images(tmp_path: Path) -> None:
    save(tmp_path, "cats/1.png")
    (tmp_path / "best").symlink_to("cats")
    assert open_class_folders(tmp_path).classes == ["cats"]


def test_an_unreadable_folder_is_logged_and_left_out(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scandir: Callable[[Any], Iterator[os.DirEntry[str]]] = os.scandir

    def guarded(path: Any) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "cats":  # file modes would not stop a superuser
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert {path.parent.name for path in find_images(photos)} == {"dogs"}
    assert (
        f"the folder {photos / 'cats'} can't be read (Permission denied) and is left out"
        in capsys.readouterr().err
    )


def test_hidden_files_and_leftovers_of_archives_are_left_out(tmp_path: Path) -> None:
    save(tmp_path, "a.png", ".hidden.png", ".cache/b.png")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._a.png").write_bytes(b"a resource fork")
    (tmp_path / "._a.png").write_bytes(b"a resource fork")
    (tmp_path / "labels.csv").write_text("a,1")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    assert find_images(tmp_path) == [tmp_path / "a.png"]


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    save(tmp_path, "a.PNG", "b.JPEG")
    assert len(find_images(tmp_path)) == 2


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        (["train", "val"], "train", "val"),
        (["test", "train", "val"], "train", "val"),
        (["test", "train"], "train", "test"),
        (["Training", "Validation", "test"], "Training", "Validation"),
        (["train", "valid", "cats"], "train", "valid"),
    ],
)
def test_a_folder_of_splits_is_refused_and_two_of_them_are_suggested(
    tmp_path: Path, splits: list[str], train: str, val: str
) -> None:
    save(tmp_path, *(f"{split}/cats/{i}.png" for split in splits for i in range(4)))
    with pytest.raises(
        InputError,
        match=rf"holds the splits .*data\.root={tmp_path / train} data\.val_root={tmp_path / val}$",
    ):
        folder(tmp_path)


def test_validation_uses_the_validation_folder_only(tmp_path: Path) -> None:
    save(
        tmp_path,
        *(f"train/{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(3)),
        "val/cats/9.png",
        "val/dogs/9.png",
    )
    data = folder(tmp_path / "train", val_root=str(tmp_path / "val"))
    assert (len(names(data, "train")), names(data, "val")) == (6, ["cats/9.png", "dogs/9.png"])
    assert data.samples("val").__getitems__([0, 1])[1].tolist() == [0, 1]


def test_a_validation_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "train/cats/1.png", "train/dogs/2.png", "val/cats/3.png", "val/eels/4.png")
    with pytest.raises(InputError, match="that the training images in .*train lack: eels; rename"):
        folder(tmp_path / "train", val_root=str(tmp_path / "val"))


CLASSES = [
    (["b/1.png", "c/1.png"], [1, 2], "val has images of 2 of the 3 classes in {train}, none of a"),
    (["c/1.png"], [2], "val has images of 1 of the 3 classes in {train}, none of a, b"),
    (
        ["a/1.png", "b/1.png", "c/1.png", "4.png"],
        [-1, 0, 1, 2],
        "1 images of {val} lie in no class",
    ),
    (
        ["1.png", "2.png"],
        [-1, -1],
        "val has images of 0 of the 3 classes in {train}, none of a, b, c",
    ),
    (["a/1.png", "b/1.png", "c/1.png"], [0, 1, 2], None),
]


@pytest.mark.parametrize(("files", "labels", "sentence"), CLASSES)
def test_a_validation_folder_may_lack_classes_and_says_so(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: list[str],
    labels: list[int],
    sentence: str | None,
) -> None:
    train, val = tmp_path / "train", tmp_path / "val"
    save(tmp_path, *(f"train/{kind}/0.png" for kind in "abc"), *(f"val/{file}" for file in files))
    data = folder(train, val_root=str(val), batch_size=1)
    assert data.samples("val").__getitems__(range(len(files)))[1].tolist() == labels
    assert data.classes == ["a", "b", "c"]
    printed = capsys.readouterr().err
    assert (sentence.format(train=train, val=val) in printed) if sentence else not printed


def test_class_folders_of_validation_images_do_not_count_if_training_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "train/1.png", "val/a/1.png", "val/b/2.png")
    data = folder(tmp_path / "train", val_root=str(tmp_path / "val"), batch_size=1)
    assert data.samples("val").__getitems__(range(2))[1].tolist() == [0, 0]
    assert f"the class folders of {tmp_path / 'val'} don't count" in capsys.readouterr().err


def test_copies_of_validation_files_are_left_out_of_training_and_logged(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(photos / "dogs" / "7.png", photos / "cats" / "copy.png")
    shutil.copy(
        photos / "dogs" / "0.png", photos / "cats" / "other.png"
    )  # both are in training, which is allowed
    for _ in range(2):
        data = folder(photos, held_out="last")
        assert "cats/copy.png" not in names(data, "train")
        assert {"cats/other.png", "dogs/0.png"} < set(names(data, "train"))
        assert (
            "1 training images are copies of validation images and are left out"
            in capsys.readouterr().err
        )
        monkeypatch.setattr(
            "codegrid.data.folder._hash_file", None
        )  # copies are searched for once and then cached


def test_images_of_equal_size_are_no_copies(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(noise(8, 8, seed=i)).save(tmp_path / f"{i}.bmp")
    assert len(names(folder(tmp_path, n_val=1, cache_dir=str(tmp_path / "cache")), "train")) == 3


def test_empty_files_are_unreadable_and_not_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "root", "a.png", "y.png")
    for name in ("b.png", "z.png"):
        (tmp_path / "root" / name).write_bytes(b"")
    folder(tmp_path / "root", n_val=2, held_out="last", on_error="skip").prepare_data()
    report = capsys.readouterr().err
    assert "1 of 2 train images can't be read and are left out: b.png (empty file)" in report
    assert "1 of 2 val images can't be read and are left out: z.png (empty file)" in report


def test_training_images_that_are_all_copies_are_refused(photos: Path) -> None:
    with pytest.raises(
        InputError, match=f"all 16 training images below {photos} are copies of validation images"
    ):
        folder(photos, val_root=str(photos))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_val": 16}, "n_val=16 must leave both splits an image"),
        ({"held_out": "first"}, "held_out=first must be random or last"),
        ({"channels": 17}, "channels=17 must be a whole number from 1 to 16"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"cache": "memory"}, "cache=memory must be one of none, ram, disk"),
        ({"on_error": "ignore"}, "on_error=ignore must be one of stop, skip"),
        ({"crop": "corner"}, "crop=corner must be one of centre, random"),
        ({"fit": "squeeze"}, "fit=squeeze must be one of crop, pad, stretch"),
        ({"resize": 8}, "resize=8 must be at least data.image_size=16"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    photos: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        folder(photos, **settings)


def test_an_empty_a_missing_and_an_unnamed_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        folder(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="add data.root="):
        make_images(Folder, None)
    with pytest.raises(InputError, match=r"data\.val_root=.*nowhere is not a folder"):
        folder(tmp_path, val_root=str(tmp_path / "nowhere"))


def test_a_fit_says_how_images_of_other_proportions_get_their_size(tmp_path: Path) -> None:
    middle = np.zeros((16, 32, 3), np.uint8)
    middle[:, 8:24] = 200
    for name in ("a.png", "b.png"):
        save_unique(Image.fromarray(middle), tmp_path / "root" / name, ord(name[0]))
    corners, edges, keys = [], [], []
    for fit in ("crop", "pad", "stretch"):
        data = folder(tmp_path / "root", image_size=[16, 16], n_val=1, fit=fit)
        [pixels] = images(data, "train").values()
        corners.append(int(pixels[0, 0, 0]))
        edges.append([int(pixels[0, 0, 8]), int(pixels[0, 8, 0])])  # above and left
        keys.append(data.cache_key("train").get("fit"))
    assert corners == [200, 0, 0]
    assert edges == [[200, 200], [0, 0], [200, 0]]
    assert keys == [None, "pad", "stretch"]  # caches of earlier versions stay valid


def test_bands_of_tiffs_become_the_channels_of_a_dataset(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4000, (4, 48, 80, 5), np.uint16)
    root = tmp_path / "bands"
    root.mkdir()
    for i, (bands, settings) in enumerate(
        zip(values, [{}, {"planarconfig": "contig"}, {"planarconfig": "separate"}, {}], strict=True)
    ):
        planes = bands.transpose(2, 0, 1) if i > 1 else bands
        tifffile.imwrite(root / f"{i}.tif", planes, photometric="minisblack", **settings)
    for cache in ("none", "ram", "disk"):
        data = folder(root, image_size=[48, 80], channels=5, n_val=1, held_out="last", cache=cache)
        data.prepare_data()
        assert data.decisions()["range"] == [0, 4095]
        expected = [np.rint(v.transpose(2, 0, 1) * (65_535 / 4095)) for v in values]
        for split, part in (("train", expected[:3]), ("val", expected[3:])):
            assert np.array_equal([*images(data, split).values()], part)


def save_deep(root: Path, highest: list[int], kind: type = np.uint16, suffix: str = "png") -> None:
    """Write grey images 00, 01 ... whose values rise from 0 to each of these."""
    for i, value in enumerate(highest):
        ramp = np.linspace(0, value, 256).reshape(16, 16).astype(kind)
        save_unique(Image.fromarray(ramp), root / f"{i:02}.{suffix}", i)


def save_unique(image: Image.Image, file: Path, length: int) -> None:
    """Write an image with so many bytes behind it, which readers skip, so that it is no copy of another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    file.write_bytes(file.read_bytes() + bytes(length))


def brightness(data: Folder, split: str = "train") -> list[int]:
    return [int(pixels.max()) for pixels in images(data, split).values()]


@pytest.mark.parametrize("depth", [8, None])
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_values_of_fewer_bits_than_their_files_are_not_black(
    tmp_path: Path, cache: str, depth: int | None
) -> None:
    save_deep(tmp_path / "slices", [1000, 0, 4095, 2000, 0, 3000])
    data = folder(tmp_path / "slices", n_val=2, held_out="last", cache=cache, depth=depth)
    data.prepare_data()
    decided = {"range": [0, 4095], "number_type": "uint16"}
    assert data.decisions().items() >= (decided | ({} if depth else {"depth": 16})).items()
    levels = (
        [62, 0, 255, 125] if depth else [round(65_535 * v / 4095) for v in (1000, 0, 4095, 2000)]
    )
    assert brightness(data) == levels
    assert brightness(data, "val") == [0, 187 if depth else round(65_535 * 3000 / 4095)]


@pytest.mark.parametrize(
    ("kind", "suffix", "highest", "value_range"),
    [
        (np.int32, "tif", 900, [0, 1023]),
        (np.float32, "tiff", 0.7, [0, 1]),
        (np.float32, "tif", 3000, [0, 4095]),
        (np.uint16, "tif", 60_000, [0, 65_535]),
        (np.uint16, "png", 5, [0, 7]),
    ],
)
def test_the_range_fits_the_largest_value_of_all(
    tmp_path: Path, kind: type, suffix: str, highest: Any, value_range: list[float]
) -> None:
    save_deep(tmp_path / "deep", [highest / 2, highest, highest / 4], kind, suffix)
    data = folder(tmp_path / "deep", n_val=1, held_out="last")
    data.prepare_data()
    assert data.decisions()["range"] == value_range
    assert brightness(data)[1] >= 2**15
    assert data.decisions()["number_type"] == np.dtype(kind).name


@pytest.mark.parametrize("late", [5, 18])
@pytest.mark.parametrize("others", [0, 100, None], ids=["blank", "7 bits", "8-bit files"])
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_value_that_the_sample_misses_widens_the_range_for_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: str,
    others: int | None,
    late: int,
) -> None:
    monkeypatch.setattr("codegrid.data.source.spread", lambda n, most: [1])
    monkeypatch.setattr("codegrid.data.survey.spread", lambda n, most: [0] if n else [])
    root = tmp_path / "slices"
    save_deep(root, [others or 0] * 20)
    if others is None:
        for i in range(20):
            Image.fromarray(noise(16, 16, seed=i)).save(root / f"{i:02}.png")
    save_deep(tmp_path / "one", [1000])
    shutil.move(tmp_path / "one" / "00.png", root / f"{late:02}.png")
    settings = {"n_val": 2, "held_out": "last", "cache": cache}
    data = folder(root, **settings)
    data.prepare_data()
    assert data.decisions()["range"] == [0, 1023]
    name = f"{late:02}.png"
    # A sample of 8-bit files alone decides for pixels of 8 bits.
    highest = round(1000 * 65_535 / 1023) if others is not None else 1000 * 256 // 1024
    assert (images(data, "train") | images(data, "val"))[name].max() == highest
    assert "beyond those of the sample: data.range=[0,1023]" in capsys.readouterr().err
    again = folder(root, **settings)
    again.prepare_data()
    assert again.decisions() == data.decisions()
    assert "beyond" not in capsys.readouterr().err, "the range is cached"


def test_a_later_stage_reads_images_as_the_run_recorded_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "slices"
    save_deep(root, [1000, 900, 800, 700])
    first = folder(root, n_val=1, held_out="last")
    first.prepare_data()
    save_deep(root, [1000, 900, 3000, 700])
    later = folder(root, n_val=1, held_out="last", **first.decisions())
    assert brightness(later) == [round(v * 65_535 / 1023) for v in (1000, 900, 1023)]
    assert (
        "1 images have values beyond data.range=[0,1023], from 0 to 3,000, which are cut off"
        in capsys.readouterr().err
    )


def test_runs_of_version_0_1_read_the_upper_bits_as_they_did(tmp_path: Path) -> None:
    save_deep(tmp_path / "slices", [4095, 4095])
    earlier: dict[str, Any] = {
        "range": [0, 65_535],
        "depth": 8,
        "alpha": "white",
        "classes": SORTED,
    }
    earlier |= {"suffixes": list(IMAGE_SUFFIXES), "split_seed": None}
    data = folder(tmp_path / "slices", n_val=1, **earlier)
    assert brightness(data) == [15]
    assert data.decisions() == {"number_type": "uint16"}  # which changes no pixel


def test_near_infrared_that_is_marked_as_alpha_is_left_out(tmp_path: Path) -> None:
    colours, infrared = noise(16, 16), noise(16, 16, seed=1)[..., :1]
    for i in range(4):
        image = Image.fromarray(np.dstack([colours, infrared]))
        save_unique(image, tmp_path / "fields" / f"{i}.tif", i)
    data = folder(tmp_path / "fields", n_val=1, held_out="last")
    assert data.decisions()["alpha"] == "ignore"
    assert np.array_equal(images(data, "val")["3.tif"], colours.transpose(2, 0, 1))
    assert folder(tmp_path / "fields", n_val=1, alpha="white").cache_key("val") != data.cache_key(
        "val"
    )


@pytest.mark.parametrize("levels", [[0, 255], [0] * 8 + [40, 255], [128], [0, 85, 170, 255]])
def test_a_mask_stays_transparency(tmp_path: Path, levels: list[int]) -> None:
    alpha = np.resize(np.array(levels, np.uint8), (16, 16, 1))
    for i in range(4):
        image = Image.fromarray(np.dstack([noise(16, 16), alpha]))
        save_unique(image, tmp_path / "logos" / f"{i}.png", i)
    data = folder(tmp_path / "logos", n_val=1)
    assert data.decisions()["alpha"] == "white"
    assert all("fourth" not in sentence for sentence in data.describe()["odd"])


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jif"])
def test_other_endings_of_the_same_formats_are_images(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "root", "a.png", "b.png")
    Image.fromarray(noise(20, 20)).save(tmp_path / "root" / f"c.{suffix}", "JPEG")
    data = folder(tmp_path / "root", n_val=1, held_out="last")
    assert names(data, "val") == [f"c.{suffix}"]
    earlier = folder(tmp_path / "root", n_val=1, held_out="last", suffixes=list(IMAGE_SUFFIXES))
    assert names(earlier, "val") == ["b.png"]


@pytest.mark.parametrize("suffixes", [".png", ["png"], ["*.PNG"], [".png"]])
def test_endings_may_be_written_in_any_way(tmp_path: Path, suffixes: Any) -> None:
    save(tmp_path / "root", "a.png", "b.png", "c.jpg")
    data = folder(tmp_path / "root", n_val=1, suffixes=suffixes)
    assert data.suffixes == [".png"]
    assert dict(data.left_out) == {"jpg": 1}


def test_a_folder_of_other_files_says_which_endings_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"add the endings of its files \(1 \.raw\) to data\.suffix"
    ):
        folder(tmp_path)


def test_arrays_beside_pictures_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    save(tmp_path, *(f"{i}.png" for i in range(4)))
    np.save(tmp_path / "features.npy", np.zeros((8, 8), np.uint8))
    data = folder(tmp_path, n_val=1, suffixes=None)
    assert len(data.source("train")) + len(data.source("val")) == 4
    assert dict(data.left_out) == {"npy": 1}
    assert ".npy" not in data.decisions()["suffixes"]
    both = folder(tmp_path, n_val=1, suffixes=[".npy", ".png"])
    assert len(both.source("train")) + len(both.source("val")) == 5
    for i in range(1, 4):
        (tmp_path / f"{i}.png").unlink()
    np.save(tmp_path / "more.npy", np.ones((8, 8), np.uint8))
    alone = folder(tmp_path, n_val=1, suffixes=None)
    assert len(alone.source("train")) + len(alone.source("val")) == 2
    assert dict(alone.left_out) == {"png": 1}
    (tmp_path / "0.png").unlink()
    alone = folder(tmp_path, n_val=1, suffixes=None)
    assert len(alone.source("train")) + len(alone.source("val")) == 2


def test_class_folders_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    save(tmp_path / "root", *(f"{name}/{i}.png" for name in (10, 2, 1) for i in range(2)))
    data = folder(tmp_path / "root", n_val=1)
    assert data.classes == data.decisions()["classes"] == ["1", "2", "10"]
    assert folder(tmp_path / "root", n_val=1, classes=SORTED).classes == ["1", "10", "2"]


def test_a_later_stage_keeps_the_numbers_of_classes_when_others_come(tmp_path: Path) -> None:
    save(tmp_path / "root", "cats/1.png", "dogs/1.png", "dogs/2.png")
    first = folder(tmp_path / "root", n_val=1)
    save(tmp_path / "root", "ants/1.png")
    later = folder(tmp_path / "root", n_val=1, **first.decisions())
    assert later.classes == ["cats", "dogs", "ants"]
    assert sorted(later.samples("train").labels.tolist()) != [0, 0, 0]


def test_both_folders_of_a_split_have_the_same_numbers(tmp_path: Path) -> None:
    save(tmp_path, *(f"{root}/{name}/{root}.png" for root in ("t", "v") for name in (1, 2, 10)))
    data = folder(tmp_path / "t", val_root=str(tmp_path / "v"), classes=["10", "1", "2"])
    assert data.samples("val").labels.tolist() == data.samples("train").labels.tolist() == [1, 0, 2]
