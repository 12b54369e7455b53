"""Samples on disk: what is written is what was drawn, a killed run goes on, and nothing but a batch is in memory."""

import io
import json
import shutil
import tarfile
import tracemalloc
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.images import to_uint8
from codegrid.data.pixels import PixelRules
from codegrid.engine.errors import InputError
from prior.decoding.pictures import show_pixels
from prior.saving import (
    CodeFile,
    FirstSamples,
    NpyFile,
    NpzFile,
    PngFiles,
    SampleBatch,
    SampleFiles,
    SampleSaver,
    ShardFiles,
    check_journal,
    read_journal,
)
from tests.helpers.images import make_images

N, SIZE, GRID = 23, (4, 6), (2, 3)
LABELS = torch.arange(N) % 4 - 1
ABOUT = {"model": "abc"}
INT16 = PixelRules((-1000, 1040), number_type="int16")


def draw_batch(first: int, b: int = 5, channels: int = 3) -> SampleBatch:
    """Samples of noise that depend on their number only."""
    stop = min(first + b, N)
    images = [
        np.random.default_rng(i).integers(0, 256, (channels, *SIZE), np.uint8)
        for i in range(first, stop)
    ]
    codes = torch.arange(first, stop)[:, None, None].repeat(1, *GRID)
    pixels = np.stack(images)
    return SampleBatch(
        first, torch.from_numpy(pixels), codes, LABELS[first:stop], values=to_int16(pixels)
    )


def to_int16(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pixels of 0 to 255 in units of -1000 to 1040."""
    return (pixels.astype(np.int16) * 8 - 1000).astype(np.int16)


def make_saver(folder: Path, channels: int = 3, shard_size: int = 7) -> SampleSaver:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("stage: sample\n")
    forms: dict[str, SampleFiles] = {
        "png": PngFiles(folder / "samples"),
        "npz": NpzFile(folder / "samples.npz", (N, *SIZE, 3)),
        "npy": NpyFile(folder / "samples.npy", (N, *SIZE, channels), INT16),
        "shards": ShardFiles(folder / "shards", N, shard_size),
        "codes": CodeFile(folder / "codes.pt", (N, *GRID), LABELS, ["oak", "beech", "elm"]),
        "first": FirstSamples(folder / "first", (12, channels, *SIZE)),
    }
    return SampleSaver(folder, N, ABOUT, forms)


def save_until(saver: SampleSaver, stop: int, b: int = 5, channels: int = 3) -> None:
    saver.resume()
    while saver.done < stop:
        saver.save(draw_batch(saver.done, b, channels))


def all_files(folder: Path) -> dict[str, bytes]:
    """The content of every file but the journal."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".jsonl"
    }


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of a run without an interruption."""
    saver = make_saver(tmp_path / "whole")
    save_until(saver, N)
    saver.finish()
    saver.remove_parts()
    return all_files(tmp_path / "whole")


def test_every_form_holds_what_was_drawn(whole: dict[str, bytes], tmp_path: Path) -> None:
    drawn = draw_batch(0, N).images.permute(0, 2, 3, 1).numpy()
    folder = tmp_path / "whole"
    assert np.array_equal(np.load(folder / "samples.npz")["arr_0"], drawn)
    values = np.load(folder / "samples.npy", mmap_mode="r")
    assert values.dtype == np.int16
    assert np.array_equal(values, to_int16(drawn))
    about = json.loads((folder / "samples.json").read_text())
    assert about["range"] == [-1000, 1040]
    assert (about["shape"], about["type"]) == ([N, *SIZE, 3], "int16")
    with zipfile.ZipFile(folder / "samples.npz") as archive:
        assert archive.testzip() is None
    for i, image in enumerate(drawn):
        assert np.array_equal(np.asarray(Image.open(folder / f"samples/{i:06d}.png")), image)
    saved = torch.load(folder / "codes.pt", weights_only=True)
    assert torch.equal(saved["codes"], draw_batch(0, N).codes)
    assert torch.equal(saved["labels"], LABELS)
    assert saved["classes"] == ["oak", "beech", "elm"]
    assert not [name for name in whole if "part" in name]


def test_shards_hold_pictures_and_classes_in_order(whole: dict[str, bytes], tmp_path: Path) -> None:
    names, labels = [], []
    for k, size in enumerate((7, 7, 7, 2)):
        with tarfile.open(tmp_path / f"whole/shards/{k:06d}.tar") as tar:
            members = tar.getmembers()
            assert len(members) == 2 * size
            for png, cls in zip(members[::2], members[1::2], strict=True):
                names.append(png.name)
                content = tar.extractfile(png).read()  # type: ignore[union-attr]
                assert content == whole[f"samples/{png.name}"]
                labels.append(int(tar.extractfile(cls).read()))  # type: ignore[union-attr]
    assert names == [f"{i:06d}.png" for i in range(N)]
    assert labels == LABELS.tolist()


@pytest.mark.parametrize("stop", [0, 5, 10, 15, 20, 23])
@pytest.mark.parametrize("shard_size", [1, 5, 7, 50])
def test_a_run_that_is_killed_after_any_batch_ends_in_the_same_files(
    tmp_path: Path, stop: int, shard_size: int
) -> None:
    for name, stops in (("plain", [N]), ("killed", [stop, N])):
        for each in stops:
            saver = make_saver(tmp_path / name, shard_size=shard_size)
            save_until(saver, each)
        saver.finish()
        saver.remove_parts()
    assert all_files(tmp_path / "killed") == all_files(tmp_path / "plain")


@pytest.mark.parametrize("form", ["png", "npz", "npy", "shards", "codes", "first", "journal"])
def test_a_run_that_is_killed_while_it_writes_a_batch_ends_in_the_same_files(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Everything before `form` has the batch, `form` half of it, and everything after it nothing."""
    killed = tmp_path / "killed"
    saver = make_saver(killed)
    save_until(saver, 10)
    batch = draw_batch(10)
    for name, files in saver.forms.items():
        if name == form:
            half = draw_batch(10, 2)
            files.write(half)
            break
        files.write(batch)
    if form == "journal":
        with (killed / "samples.jsonl").open("a") as journal:
            journal.write('{"first": 10, "n": 5, "mar')
    again = make_saver(killed)
    assert again.resume() == 10
    save_until(again, N)
    again.finish()
    again.remove_parts()
    assert all_files(killed) == whole


@pytest.mark.parametrize(
    ("file", "position", "done"),
    [
        ("samples/000012.png", 40, 10),
        (".samples.npz.part", 1500, 15),
        (".samples.npz.part", 10, 20),  # what comes before the array is written anew at the end
        (".samples.npz.part", 700, 5),
        (".samples.npy.part", 10, 20),
        (".samples.npy.part", 1500, 5),
        ("shards/000000.tar", 100, 0),
        ("shards/000001.tar", -1, 10),
        (".codes.int64.part", -1, 15),
        (".first.part", 3, 0),
    ],
)
def test_damage_is_noticed_and_drawn_again_from_there(
    whole: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    position: int,
    done: int,
) -> None:
    killed = tmp_path / "killed"
    save_until(make_saver(killed), 20)
    content = bytearray((killed / file).read_bytes())
    content[position] ^= 1
    (killed / file).write_bytes(content)
    again = make_saver(killed)
    assert again.resume() == done
    assert ("are not as they were written" in capsys.readouterr().err) == (done < 20)
    save_until(again, N)
    again.finish()
    again.remove_parts()
    assert all_files(killed) == whole


@pytest.mark.parametrize("lost", ["samples/000003.png", ".samples.npz.part", "shards", "samples"])
def test_what_is_missing_is_drawn_again(whole: dict[str, bytes], tmp_path: Path, lost: str) -> None:
    killed = tmp_path / "killed"
    save_until(make_saver(killed), 15)
    path = killed / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = make_saver(killed)
    assert again.resume() == 0
    save_until(again, N)
    again.finish()
    again.remove_parts()
    assert all_files(killed) == whole


def test_a_run_that_is_killed_between_its_last_batch_and_its_result_goes_on(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    first = make_saver(killed)
    save_until(first, N)
    first.finish()
    again = make_saver(killed)
    assert again.resume() == N
    assert torch.equal(again.first_samples(), draw_batch(0, 12).images)
    again.finish()
    again.remove_parts()
    assert all_files(killed) == whole


def test_batches_of_another_size_go_on_as_well(whole: dict[str, bytes], tmp_path: Path) -> None:
    for stop, b in ((9, 3), (17, 4), (N, 7)):
        saver = make_saver(tmp_path / "mixed")
        save_until(saver, stop, b)
    saver.finish()
    saver.remove_parts()
    assert all_files(tmp_path / "mixed") == whole


def test_grey_samples_are_saved_with_three_equal_channels(tmp_path: Path) -> None:
    saver = make_saver(tmp_path / "grey", channels=1)
    save_until(saver, N, channels=1)
    saver.finish()
    grey = draw_batch(0, N, channels=1).images
    pixels = np.load(tmp_path / "grey/samples.npz")["arr_0"]
    assert np.array_equal(pixels, grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    assert np.asarray(Image.open(tmp_path / "grey/samples/000007.png")).shape == (*SIZE, 3)
    assert torch.equal(saver.first_samples(), grey[:12])


@pytest.mark.parametrize("shown", [(1,), (5, 1, 2)])
def test_samples_of_five_channels_and_16_bits_keep_all_in_the_npy_and_are_shown_elsewhere(
    tmp_path: Path, shown: tuple[int, ...]
) -> None:
    n, rules = 3, PixelRules(((0, 4095),) * 4 + ((-1, 1),), depth=16, show=shown)
    x = torch.rand(n, 5, *SIZE) * 2 - 1
    pixels = rules.to_pixels(x)
    forms: dict[str, SampleFiles] = {
        "npz": NpzFile(tmp_path / "samples.npz", (n, *SIZE, 3)),
        "npy": NpyFile(tmp_path / "samples.npy", (n, *SIZE, 5), rules),
        "first": FirstSamples(tmp_path / "first", (2, 5, *SIZE), rules.depth),
    }
    saver = SampleSaver(tmp_path, n, ABOUT, forms)
    saver.resume()
    pictures = show_pixels(pixels, rules)
    saver.save(SampleBatch(0, pixels, pictures=pictures, values=rules.to_units(x)))
    result = saver.finish()
    values = np.load(result["npy"])
    assert (values.dtype, values.shape) == (np.float32, (n, *SIZE, 5))
    low, high = np.array(rules.ranges).T
    expected = low + (x.permute(0, 2, 3, 1).numpy() + 1) / 2 * (high - low)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-3)
    assert result["range"] == 4 * [[0, 4095]] + [[-1, 1]]
    first = saver.first_samples()
    assert torch.equal(first, pixels[:2])
    assert first.dtype == pixels.dtype == torch.int32
    picked = to_uint8(x)[:, [channel - 1 for channel in shown]].expand(-1, 3, -1, -1)
    stored = np.load(result["npz"])["arr_0"].astype(int)
    assert np.abs(stored - picked.permute(0, 2, 3, 1).numpy()).max() <= 1  # 16 bits, then 8
    assert torch.equal(show_pixels(first, rules), pictures[:2])


def test_the_npz_and_the_npy_have_their_names_only_when_they_are_whole(tmp_path: Path) -> None:
    saver = make_saver(tmp_path / "part")
    save_until(saver, 20)
    assert not list((tmp_path / "part").glob("samples.np*"))
    assert sorted(file.name for file in (tmp_path / "part/shards").glob("0*.tar")) == [
        "000000.tar",
        "000001.tar",
    ]


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(tmp_path: Path) -> None:
    saver = make_saver(tmp_path / "a")
    save_until(saver, N)
    saver.finish()
    (tmp_path / "a/metrics.json").write_text("{}")
    saver.remove_parts()
    before = all_files(tmp_path / "a")
    with pytest.raises(InputError, match=r"was finished by another process.*resume=.* prints its"):
        make_saver(tmp_path / "a").resume()
    assert all_files(tmp_path / "a") == before


def test_samples_of_another_model_are_not_continued(tmp_path: Path) -> None:
    saver = make_saver(tmp_path / "a")
    save_until(saver, 10)
    check_journal(tmp_path / "a", ABOUT)
    with pytest.raises(InputError, match=r"drawn with another model \(abc, now xyz\)"):
        check_journal(tmp_path / "a", {"model": "xyz"})
    check_journal(tmp_path, {"model": "xyz"})  # a run that was killed before its first batch


@pytest.mark.parametrize(
    "text", ["", "{", "5", '{"format": 1}\n{"first": 5, "n": 5}\n', '{"format": 1}\n[]', "\0\0\0"]
)
def test_a_journal_without_a_first_batch_means_that_nothing_is_drawn(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "samples.jsonl").write_text(text)
    assert read_journal(tmp_path)[1] == []
    saver = make_saver(tmp_path)
    assert saver.resume() == 0


def test_a_full_disk_gets_a_sentence_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make_saver(tmp_path / "full")
    save_until(saver, 10)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prior.saving.NpzFile.write", refuse)
    with pytest.raises(InputError, match=r"No space left on device.*make room.*resume=.*full"):
        saver.save(draw_batch(10))
    monkeypatch.undo()
    assert make_saver(tmp_path / "full").resume() == 10


def tiny_batches(n: int) -> Iterator[SampleBatch]:
    for first in range(0, n, 100):
        images = torch.full((100, 3, 16, 16), first % 256, dtype=torch.uint8)
        yield SampleBatch(first, images, torch.zeros(100, 4, 4, dtype=torch.int64))


def test_no_more_than_a_batch_is_in_memory_whatever_n_is(tmp_path: Path) -> None:
    peaks = []
    for n in (200, 2000):
        folder = tmp_path / str(n)
        folder.mkdir()
        forms: dict[str, SampleFiles] = {
            "npz": NpzFile(folder / "samples.npz", (n, 16, 16, 3)),
            "codes": CodeFile(folder / "codes.pt", (n, 4, 4), None),
            "first": FirstSamples(folder / "first", (16, 3, 16, 16)),
        }
        saver = SampleSaver(folder, n, ABOUT, forms)
        saver.resume()
        alive: list[weakref.ref[torch.Tensor]] = []
        tracemalloc.start()
        for batch in tiny_batches(n):
            alive.append(weakref.ref(batch.images))
            saver.save(batch)
            assert sum(reference() is not None for reference in alive) <= 2
        saver.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert np.load(folder / "samples.npz")["arr_0"].shape == (n, 16, 16, 3)
    assert peaks[1] < 2000 * 3 * 16 * 16 / 3, "a third of what the samples take"
    assert peaks[1] < peaks[0] + 50_000


def test_the_journal_names_each_batch(tmp_path: Path) -> None:
    save_until(make_saver(tmp_path / "a"), 10)
    about, *entries = map(json.loads, (tmp_path / "a/samples.jsonl").read_text().splitlines())
    assert about == {"format": 1, **ABOUT}
    assert [(entry["first"], entry["n"]) for entry in entries] == [(0, 5), (5, 5)]
    assert all(entry["marks"].keys() >= {"png", "npz", "shards"} for entry in entries)


def test_equal_samples_give_equal_archives(whole: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(whole["shards/000000.tar"])) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_shards_of_samples_are_a_dataset_to_train_on(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    from codegrid.data.hf import HF

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = str(tmp_path / "whole/shards/*.tar")
    settings = {"image": "png", "label": "cls", "n_val": 3, "held_out": "last", "image_size": 4}
    data = make_images(
        HF, path="webdataset", files=files, cache_dir=str(tmp_path), cache="ram", **settings
    )
    images, labels = data.samples("train").__getitems__(range(20))
    middle = draw_batch(0, 20).images[:, :, :, 1:5]
    assert torch.equal(images, middle)
    assert labels.tolist() == LABELS[:20].tolist()
