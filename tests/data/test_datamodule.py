import os
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.decode import UnreadableImage
from codegrid.data.form import Form
from codegrid.data.images import crop_at, to_float
from codegrid.data.samples import LiveSamples
from codegrid.data.source import Source
from codegrid.engine.cli import explain_error
from codegrid.engine.errors import InputError
from tests.helpers.images import image_settings


class Noise(Source):
    """Image i is its own noise at any size and has the label i; the images in `broken` are unreadable."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__(n, {"noise": n, "broken": broken})
        self.broken = set(broken)

    def read_image(self, index: int, form: Form) -> tuple[NDArray[np.uint8], int]:
        if index in self.broken:
            raise UnreadableImage("a hole")
        return np.random.default_rng(index).integers(0, 256, form.shape, np.uint8), index


class Images(ImageDataModule):
    def __init__(self, train: Source, val: Source | None = None, **settings: Any) -> None:
        small = {"image_size": 8, "batch_size": 4, "cache": "ram", "num_workers": 0}
        super().__init__(**image_settings(**{**small, **settings}))
        self.sources = {"train": train, "val": val or train}

    def open_source(self, split: str) -> Source:
        return self.sources[split]


def everything(data: ImageDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    values, labels = zip(*data.val_dataloader(), strict=True)
    return torch.cat(values), torch.cat(labels)


def batch(n: int, side: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (n, channels, side, side), np.uint8)
    )


def test_batches_arrive_in_the_models_range_layout_and_size() -> None:
    data = Images(Noise(10), resize=12)
    images, labels = next(iter(data.val_dataloader()))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 12, 12))
    x, labels = data.on_after_batch_transfer((images, labels), 0)
    assert (x.dtype, x.shape, labels.dtype) == (torch.float32, (4, 3, 8, 8), torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert -1 <= x.min() < -0.9
    assert 0.9 < x.max() <= 1


@pytest.mark.parametrize(("side", "size"), [(12, 8), (9, 8), (8, 8), (11, 8)])
def test_preprocessing_takes_the_middle(side: int, size: int) -> None:
    images = batch(2, side)
    margin = (side - size) // 2
    expected = to_float(images[:, :, margin : margin + size, margin : margin + size])
    assert torch.equal(Images(Noise(4), image_size=size, resize=side).preprocess(images), expected)


def test_a_crop_is_what_slicing_gives() -> None:
    images, corners = batch(5, 9, 1), torch.tensor([[0, 0], [3, 3], [0, 3], [2, 1], [1, 2]])
    expected = torch.stack(
        [
            image[:, i : i + 6, j : j + 6]
            for image, (i, j) in zip(images, corners.tolist(), strict=True)
        ]
    )
    assert torch.equal(crop_at(images, corners, (6, 6)), expected)


def test_random_crops_reach_every_place_and_nothing_beyond() -> None:
    side, size = 6, 4
    images = (
        torch.arange(side * side, dtype=torch.uint8)
        .view(1, 1, side, side)
        .expand(400, 1, side, side)
    )
    data = Images(Noise(4), image_size=size, resize=side, crop="random", flip=False, channels=1)
    crops = {tuple(x.flatten().tolist()) for x in data.augment(images)}
    places = [(i, j) for i in range(3) for j in range(3)]
    assert crops == {
        tuple(to_float(images[0, 0, i : i + size, j : j + size]).flatten().tolist())
        for i, j in places
    }


def test_random_crops_have_room_by_default_and_validation_sees_the_middle() -> None:
    data = Images(Noise(4), image_size=16, crop="random")
    assert data.stored_size == (18, 18)
    images, _ = next(iter(data.val_dataloader()))
    x, _ = data.on_after_batch_transfer((images, torch.zeros(4)), 0)
    assert torch.equal(x, to_float(images[:, :, 1:17, 1:17]))


def test_augmentation_mirrors_each_image_independently() -> None:
    images = batch(200, 8)
    x, plain = Images(Noise(4)).augment(images), to_float(images)
    mirrored = (x == plain.flip(3)).all(3).all(2).all(1)
    assert ((x == plain).all(3).all(2).all(1) | mirrored).all()
    assert 60 < mirrored.sum() < 140


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_augmentation_draws_no_random_number_if_nothing_is_random(crop: str) -> None:
    data, images = Images(Noise(4), crop=crop, resize=8, flip=False), batch(4, 8)
    before = torch.get_rng_state()
    assert torch.equal(data.augment(images), data.preprocess(images))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("broken", [(), (0, 5, 9)])
def test_every_cache_gives_the_same_batches(tmp_path: Path, broken: tuple[int, ...]) -> None:
    datamodules = [
        Images(Noise(11, broken), cache=cache, on_error="skip", cache_dir=str(tmp_path), resize=10)
        for cache in ("none", "ram", "disk")
    ]
    first = everything(datamodules[0])
    assert first[1].tolist() == [i for i in range(11) if i not in broken]
    for data in datamodules[1:]:
        assert all(torch.equal(a, b) for a, b in zip(everything(data), first, strict=True))
        shown, expected = (
            [labels.tolist() for _, labels in islice(d.train_dataloader(), 4)]
            for d in (data, datamodules[0])
        )
        assert shown == expected


def test_threads_put_every_image_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegrid.data.datamodule.READ_CHUNK", 3)
    data = Images(Noise(40, broken=(7, 8, 39)), on_error="skip")
    images, labels = everything(data)
    assert labels.tolist() == [i for i in range(40) if i not in (7, 8, 39)]
    assert torch.equal(images[-1], torch.from_numpy(Noise(40).read_image(38, Form.square(8, 3))[0]))


@pytest.mark.parametrize("parallel", [False, True])
def test_only_a_source_that_uses_threads_is_read_by_several(
    parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, threads = Noise(40), set()
    source.use_threads = parallel
    plain = source.read_image

    def slow(index: int, form: Form) -> tuple[NDArray[np.uint8], int]:
        threads.add(threading.get_ident())
        time.sleep(0.001)  # long enough for another thread to take the next chunk
        return plain(index, form)

    monkeypatch.setattr(source, "read_image", slow)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    monkeypatch.setattr("codegrid.data.datamodule.READ_CHUNK", 3)
    Images(source).samples("train")
    assert (len(threads) > 1) == parallel


def test_a_source_that_is_not_checked_up_front_is_not_read_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Noise(10)
    source.checked_up_front = False
    monkeypatch.setattr(source, "read_image", None)
    assert len(Images(source, cache="none").samples("train")) == 10


def test_a_broken_image_of_an_unchecked_source_stops_the_run_or_is_replaced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Noise(10, broken=(1,))
    source.checked_up_front = False
    with pytest.raises(InputError, match=r"image 1 can't be read as an image \(a hole\)"):
        everything(Images(source, cache="none"))
    _, labels = everything(Images(source, cache="none", on_error="skip"))
    assert labels.tolist() == [0, 0, *range(2, 10)]
    assert (
        "image 1 can't be read (a hole); another image takes its place" in capsys.readouterr().err
    )


def test_broken_images_are_replaced_by_different_ones() -> None:
    images, labels = LiveSamples(Noise(6, broken=(0, 2, 4)), None, Form.square(8, 3)).__getitems__(
        range(6)
    )
    assert labels.tolist() == [1, 1, 3, 3, 5, 5]
    assert torch.equal(images[2], images[3])


def test_a_broken_image_alone_in_its_batch_is_replaced_by_the_next_that_can_be_read() -> None:
    _, labels = LiveSamples(Noise(6, broken=(4, 5)), None, Form.square(8, 3)).__getitems__([4])
    assert labels.tolist() == [0]


def test_a_worker_process_reports_lost_images_in_one_sentence() -> None:
    source = Noise(8, broken=tuple(range(8)))
    source.checked_up_front = False
    data = Images(source, cache="none", on_error="skip", num_workers=1)
    message: str | None = None
    try:
        next(iter(data.val_dataloader()))
    except InputError as error:
        # Without its traceback the error does not keep the loader alive, so that its worker ends now.
        message = explain_error(error.with_traceback(None))
    assert message == (
        "error: image 0 can't be read (a hole), nor the 64 after it; is the disk still there?"
    )


def test_a_key_changes_with_all_that_pixels_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Images(Noise(4)).cache_key("train")
    assert plain == Images(Noise(4), crop="random", resize=8, flip=False).cache_key(
        "train"
    )  # these are applied to each batch
    assert plain != Images(Noise(5)).cache_key("train")
    assert plain != Images(Noise(4), resize=9).cache_key("train")
    assert plain != Images(Noise(4), channels=1).cache_key("train")
    monkeypatch.setattr("codegrid.data.datamodule.DECODE_VERSION", 99)
    assert plain != Images(Noise(4)).cache_key("train")


def test_worker_processes_read_only_if_images_are_not_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(20))
    assert [
        Images(Noise(4), cache=cache, num_workers=None).num_workers
        for cache in ("none", "ram", "disk")
    ] == [8, 0, 0]
    assert Images(Noise(4), cache="none", num_workers=3).num_workers == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    assert Images(Noise(4), cache="none", num_workers=None).num_workers == 2
