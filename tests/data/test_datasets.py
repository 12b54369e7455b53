"""The contract of all datasets, on tiny copies in their real layouts, and the errors of each when it cannot work."""

import hashlib
import inspect
import io
import os
import pickle
import re
import shutil
import socket
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from threading import Thread
from time import sleep
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from litdata.streaming.writer import BinaryWriter
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat
from torch import Tensor
from torchvision import datasets

import codegrid.data.layouts
import codegrid.data.torchvision
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.folder import Folder
from codegrid.data.form import Form
from codegrid.data.hf import HF
from codegrid.data.identity import identify_images
from codegrid.data.images import to_float
from codegrid.data.layouts import FFHQ, TINY, ImageNet, TinyImageNet
from codegrid.data.litdata import LitData
from codegrid.data.shapes import Outlines, Shapes
from codegrid.data.torchvision import (
    CELEBA_ATTRIBUTES,
    CIFAR10,
    MNIST,
    STL10,
    CelebA,
    DownloadedDataModule,
    FashionMNIST,
    Flowers102,
)
from codegrid.engine.errors import InputError
from codegrid.engine.places import declared_places
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.images import image_settings, make_images

Build = Callable[..., ImageDataModule]
Batch = tuple[Tensor, Tensor]
TRAIN = [0, 1, 2] * 4  # labels of the training images
VAL = [2, 1, 0, 0, 1, 2]  # labels of the validation images


def painted(labels: Sequence[int], side: int, seed: int, channels: int = 3) -> NDArray[np.uint8]:
    """Images (n, side, side, channels), no two alike, whose brightness encodes their label."""
    noise = np.random.default_rng(seed).integers(0, 60, (len(labels), side, side, channels))
    return (noise + 64 * (np.array(labels) % 4)[:, None, None, None]).astype(np.uint8)


def read_labels(images: Tensor) -> list[int]:
    """The labels that the brightness of painted images (n, channels, side, side) encodes, -1 for the brightest."""
    return [
        band if band < 3 else -1 for band in (images.float().mean((1, 2, 3)) // 64).int().tolist()
    ]


def write(files: Sequence[Path], images: NDArray[np.uint8]) -> None:
    for file, image in zip(files, images, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def cifar10(root: Path, patch: pytest.MonkeyPatch) -> Build:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def batch(name: str, labels: list[int], seed: int) -> list[str]:
        rows = painted(labels, 32, seed).transpose(0, 3, 1, 2).reshape(len(labels), -1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
        return [name, md5(folder / name)]

    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10.classes}))
    parts = [part.tolist() for part in np.array_split(TRAIN, 5)]
    patch.setattr(
        datasets.CIFAR10,
        "train_list",
        [batch(f"data_batch_{i + 1}", part, i) for i, part in enumerate(parts)],
    )
    patch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", VAL, 9)])
    patch.setattr(
        datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    )
    return partial(make_images, CIFAR10, root=str(root))


def idx(file: Path, values: NDArray[np.uint8]) -> None:
    header = np.array([0x800 + values.ndim, *values.shape], ">i4")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header.tobytes() + values.tobytes())


def mnist(root: Path, patch: pytest.MonkeyPatch, kind: type[MNIST] = MNIST) -> Build:
    raw = root / kind.__name__ / "raw"
    for seed, (stem, labels) in enumerate((("train", TRAIN), ("t10k", VAL))):
        idx(raw / f"{stem}-images-idx3-ubyte", painted(labels, 28, seed, 1)[..., 0])
        idx(raw / f"{stem}-labels-idx1-ubyte", np.array(labels, np.uint8))
    return partial(make_images, kind, root=str(root))


def stl10(root: Path, patch: pytest.MonkeyPatch) -> Build:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    labelled = {"train": TRAIN[:8], "test": VAL}
    for seed, (name, labels) in enumerate((*labelled.items(), ("unlabeled", [-1] * 4))):
        (folder / f"{name}_X.bin").write_bytes(
            painted(labels, 96, seed).transpose(0, 3, 2, 1).tobytes()
        )
        if name in labelled:
            (folder / f"{name}_y.bin").write_bytes((np.array(labels, np.uint8) + 1).tobytes())
    for table in ("train_list", "test_list"):
        patch.setattr(
            datasets.STL10,
            table,
            [[name, md5(folder / name)] for name, _ in getattr(datasets.STL10, table)],
        )
    return partial(make_images, STL10, root=str(root))


def flowers102(root: Path, patch: pytest.MonkeyPatch) -> Build:
    folder = root / "flowers-102"
    ids = np.random.default_rng(0).permutation(18) + 1
    labels = np.array([*TRAIN, *VAL])
    write([folder / "jpg" / f"image_{i:05d}.jpg" for i in ids], painted(labels.tolist(), 24, 0))
    savemat(
        folder / "imagelabels.mat", {"labels": labels[np.argsort(ids)].astype(np.uint8)[None] + 1}
    )
    savemat(
        folder / "setid.mat",
        {"trnid": ids[None, :5], "valid": ids[None, 5:12], "tstid": ids[None, 12:]},
    )
    sums = {
        what: (name, md5(folder / name))
        for what, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    patch.setattr(datasets.Flowers102, "_file_dict", {**datasets.Flowers102._file_dict, **sums})
    return partial(make_images, Flowers102, root=str(root))


def celeba(root: Path, patch: pytest.MonkeyPatch) -> Build:
    folder = root / "celeba"
    smiling = [label % 2 for label in (*TRAIN, *VAL)]
    names = [f"{i + 1:06d}.jpg" for i in range(20)]  # the last two are of the official test set
    write([folder / "img_align_celeba" / name for name in names], painted([*smiling, 2, 2], 24, 0))
    split = [0] * 12 + [1] * 6 + [2] * 2
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {s}\n" for name, s in zip(names, split, strict=True))
    )
    rows = [
        ["1" if a == "Smiling" and s else "-1" for a in CELEBA_ATTRIBUTES] for s in (*smiling, 0, 0)
    ]
    lines = [f"{name}  {' '.join(row)}\n" for name, row in zip(names, rows, strict=True)]
    (folder / "list_attr_celeba.txt").write_text(
        f"20\n{' '.join(CELEBA_ATTRIBUTES)} \n{''.join(lines)}"
    )
    lists = [
        (number, md5(folder / name) if (folder / name).exists() else sum_, name)
        for number, sum_, name in datasets.CelebA.file_list
    ]
    patch.setattr(datasets.CelebA, "file_list", lists)
    return partial(make_images, CelebA, root=str(root), attribute="Smiling")


def tiny_imagenet(root: Path, patch: pytest.MonkeyPatch) -> Build:
    folder, wnids = root / TINY, ["n01", "n02", "n03"]
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("n02\nn03\nn01\n")
    (folder / "words.txt").write_text(
        "n00\tentity\nn01\tgoldfish\nn02\ttree frog, tree-frog\nn03\tcup\n"
    )
    train = [
        folder / "train" / wnids[k] / "images" / f"{wnids[k]}_{i}.JPEG" for i, k in enumerate(TRAIN)
    ]
    write(train, painted(TRAIN, 24, 0))
    val = [folder / "val" / "images" / f"val_{i}.JPEG" for i in range(6)]
    write(val, painted(VAL, 24, 1))
    rows = [f"{file.name}\t{wnids[k]}\t0\t0\t62\t62\n" for file, k in zip(val, VAL, strict=True)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return partial(make_images, TinyImageNet, root=str(root))


def imagenet(root: Path, patch: pytest.MonkeyPatch) -> Build:
    for seed, (split, labels) in enumerate((("train", TRAIN), ("val", VAL))):
        write(
            [root / split / f"n0{k}" / f"{split}_{i}.JPEG" for i, k in enumerate(labels)],
            painted(labels, 24, seed),
        )
    return partial(make_images, ImageNet, root=str(root))


def ffhq(root: Path, patch: pytest.MonkeyPatch) -> Build:
    numbers = [*range(0, 60_000, 5_000), *range(60_000, 60_006)]
    write(
        [root / f"{n // 1000:02d}000" / f"{n:05d}.png" for n in numbers], painted([0] * 18, 24, 0)
    )
    return partial(make_images, FFHQ, root=str(root))


def folder(root: Path, patch: pytest.MonkeyPatch) -> Build:
    write(
        [root / f"class {k}" / f"{i}.png" for i, k in enumerate((*TRAIN, *VAL))],
        painted([*TRAIN, *VAL], 24, 0),
    )
    return partial(make_images, Folder, root=str(root), n_val=6)


def shapes(root: Path, patch: pytest.MonkeyPatch) -> Build:
    return partial(make_images, Shapes, n_train=12, n_val=6)


def outlines(root: Path, patch: pytest.MonkeyPatch) -> Build:
    return partial(make_images, Outlines, n_train=12, n_val=6)


def encoded(labels: list[int], seed: int) -> list[bytes]:
    contents = [io.BytesIO() for _ in labels]
    for content, image in zip(contents, painted(labels, 24, seed), strict=True):
        Image.fromarray(image).save(content, "PNG")
    return [content.getvalue() for content in contents]


def hf(root: Path, patch: pytest.MonkeyPatch) -> Build:
    import datasets as huggingface  # takes a second

    patch.setattr(huggingface.config, "HF_DATASETS_CACHE", root / "prepared")
    huggingface.disable_progress_bars()
    kinds = huggingface.Features(
        {"image": huggingface.Image(), "label": huggingface.ClassLabel(names=["a", "b", "c"])}
    )
    for seed, (split, labels) in enumerate((("train", TRAIN), ("test", VAL))):
        images = [{"bytes": content, "path": None} for content in encoded(labels, seed)]
        table = huggingface.Dataset.from_dict({"image": images, "label": labels}, features=kinds)
        table.to_parquet(root / f"{split}.parquet")
    return partial(
        make_images,
        HF,
        path="parquet",
        files={split: str(root / f"{split}.parquet") for split in ("train", "test")},
    )


def lit(root: Path, patch: pytest.MonkeyPatch) -> Build:
    for seed, (split, labels) in enumerate((("train", TRAIN), ("val", VAL))):
        writer = BinaryWriter(str(root / split), chunk_size=4)
        for i, (content, label) in enumerate(zip(encoded(labels, seed), labels, strict=True)):
            writer.add_item(i, {"image": content, "label": label})
        writer.done()
        writer.merge(1)
    return partial(
        make_images,
        LitData,
        train=str(root / "train"),
        val=str(root / "val"),
        classes=["a", "b", "c"],
    )


# A new dataset joins the contract with one line: its name in conf/data, and a function that returns what builds its
# datamodule with 12 training and 6 validation images. If the dataset is read from files, the function writes a tiny copy
# below `root`, of `painted` images.
Prepare = Callable[[Path, pytest.MonkeyPatch], Build]
DRAWN: dict[str, Prepare] = {"shapes": shapes, "outlines": outlines}  # by the program itself
READ: dict[str, Prepare] = {
    "folder": folder,
    "cifar10": cifar10,
    "mnist": mnist,
    "fashion_mnist": partial(mnist, kind=FashionMNIST),
    "stl10": stl10,
    "flowers102": flowers102,
    "celeba": celeba,
    "tiny_imagenet": tiny_imagenet,
    "imagenet": imagenet,
    "ffhq": ffhq,
    "hf": hf,
    "litdata": lit,
}
DATASETS = DRAWN | READ

PAGE = ROOT / "docs" / "extending" / "dataset.md"


def read_block(language: str) -> str:
    """The one code block of this language on the page about new datasets."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return block


def example(root: Path, patch: pytest.MonkeyPatch) -> Build:
    """The dataset of the page, imported as a module from a file of its own."""
    root.mkdir(parents=True)
    file = root / "blobs.py"
    file.write_text(read_block("python"))
    spec = spec_from_file_location("data.blobs", file)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    patch.setitem(sys.modules, "data.blobs", module)  # pickle looks classes up there
    spec.loader.exec_module(module)
    return lambda **settings: module.Blobs(**image_settings(n_train=12, n_val=6, **settings))


CONTRACT = DATASETS | {"the page's example": example}


def class_of(name: str) -> Any:
    """The class that conf/data/<name>.yaml builds."""
    return get_class(OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml")._target_)


DOWNLOADED = [name for name in DATASETS if issubclass(class_of(name), DownloadedDataModule)]


def tiny(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> Build:
    """What builds a dataset on a tiny copy of it in tmp_path/name, whose cache is tmp_path/cache."""
    make = CONTRACT[name](tmp_path / name, patch)
    small = {"image_size": 16, "channels": 3, "flip": True, "batch_size": 4}
    small |= {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    return lambda **settings: make(**{**small, **settings})


@pytest.fixture(params=CONTRACT)
def build(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the copy is whole, so nothing may be downloaded")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tiny(request.param, tmp_path, monkeypatch)


def whole(data: ImageDataModule, split: str) -> Batch:
    images, labels = zip(*data.iterate_split(split), strict=True)
    return torch.cat(images), torch.cat(labels)


def rows(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def shown(data: ImageDataModule, n: int, done: int = 0) -> list[Batch]:
    """The next n training batches of a run that has done this many steps."""
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, training=True, lightning_module=SimpleNamespace(step=done)
    )  # type: ignore[assignment]
    return list(islice(data.train_dataloader(), n))


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) and torch.equal(k, m) for (a, k), (b, m) in pairs)


def test_every_dataset_in_conf_is_under_this_contract() -> None:
    assert set(DATASETS) == {file.stem for file in (ROOT / "conf" / "data").glob("*.yaml")}


def test_the_pages_yaml_has_the_settings_of_its_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example(tmp_path / "example", monkeypatch)
    config = OmegaConf.create(read_block("yaml"))
    kind = get_class(config._target_)
    own = [name for name in inspect.signature(kind).parameters if name != "image_settings"]
    assert list(config) == ["defaults", "_target_", *own]


def test_a_split_has_all_its_images(build: Build) -> None:
    data = build()
    assert (data.size("train"), data.size("val")) == (12, 6)


def test_batches_are_uint8_and_reach_the_model_as_floats_channels_last(build: Build) -> None:
    data = build()
    images, labels = next(iter(data.val_dataloader()))
    x, after = data.on_after_batch_transfer((images, labels), 0)
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 16, 16))
    assert torch.equal(x, to_float(images))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(after, labels)


def test_every_dataset_serves_pixels_of_sixteen_bits(build: Build) -> None:
    (deep, labels), (plain, expected) = (whole(build(depth=depth), "val") for depth in (16, 8))
    assert deep.dtype == torch.int32
    off = (to_float(deep) - to_float(plain)).abs() * 127.5
    assert off.max() <= 2  # JPEGs are decoded by another library
    assert torch.equal(labels, expected)


def test_labels_are_int64_and_have_a_name_or_are_minus_one(build: Build) -> None:
    data = build()
    for split in ("train", "val"):
        _, labels = whole(data, split)
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) <= {-1, *range(len(data.classes))}


@pytest.mark.parametrize("build", READ, indirect=True)
def test_every_image_has_its_own_label(build: Build) -> None:
    data = build()
    for split in ("train", "val"):
        images, labels = whole(data, split)
        assert labels.tolist() == read_labels(images)


def test_no_image_is_in_both_splits(build: Build) -> None:
    data = build()
    both = [row for split in ("train", "val") for row in rows(whole(data, split)[0])]
    assert len(set(both)) == 18


def test_no_file_is_in_both_splits(build: Build) -> None:
    data = build()
    train, val = (getattr(data.source(split), "files", []) for split in ("train", "val"))
    assert not set(train) & set(val)


def test_the_seed_decides_on_splits_and_order(build: Build, tmp_path: Path) -> None:
    one, same_seed, other = (
        build(seed=seed, cache_dir=str(tmp_path / str(i))) for i, seed in enumerate((5, 5, 6))
    )
    assert same(shown(one, 6), shown(same_seed, 6))
    assert torch.equal(whole(one, "val")[0], whole(same_seed, "val")[0])
    assert not same(shown(one, 6), shown(other, 6))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_grey_or_rgb_as_asked(build: Build, channels: int) -> None:
    images, _ = whole(build(channels=channels), "val")
    assert images.shape == (6, channels, 16, 16)


def test_grey_is_the_luma_of_rgb(build: Build) -> None:
    grey, colour = (whole(build(channels=channels), "val")[0].float() for channels in (1, 3))
    luma = torch.einsum("nchw,c->nhw", colour, torch.tensor([0.299, 0.587, 0.114]))
    assert (
        grey[:, 0] - luma
    ).abs().mean() < 1.5  # resizing and conversion to grey may come in either order


def test_random_crops_lie_inside_the_image_and_move(build: Build) -> None:
    data = build(crop="random", resize=20, flip=False)
    images, _ = shown(data, 1)[0]
    places = []
    for _ in range(8):
        for image, crop in zip(images, data.augment(images), strict=True):
            at = [
                (r, c)
                for r in range(5)
                for c in range(5)
                if torch.equal(to_float(image[:, r : r + 16, c : c + 16]), crop)
            ]
            assert at
            places += at[:1]
    assert images.shape[-1] == 20
    assert len(set(places)) > 4


def test_validation_shows_the_centre_of_what_training_crops(build: Build) -> None:
    data = build(crop="random", resize=20)
    images, labels = next(iter(data.val_dataloader()))
    x, _ = data.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(x, to_float(images[..., 2:18, 2:18]))


def test_the_cache_changes_nothing(build: Build) -> None:
    none, ram, disk = (
        [*shown(data, 4), whole(data, "val")]
        for data in (build(cache=c, num_workers=0) for c in ("none", "ram", "disk"))
    )
    assert same(none, ram)
    assert same(none, disk)


def test_a_second_run_reads_the_cache_and_no_image(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, again = build(), build()
    images, labels = whole(before, "val")
    for method in ("read_image", "read_batch"):
        monkeypatch.setattr(type(again.source("val")), method, None)
    assert same([whole(again, "val")], [(images, labels)])


def test_every_epoch_shows_every_image_once(build: Build) -> None:
    data = build()
    everything = sorted(rows(whole(data, "train")[0]))
    batches = [row for images, _ in shown(data, 6) for row in rows(images)]
    assert sorted(batches[:12]) == everything
    assert sorted(batches[12:]) == everything
    assert batches[:12] != batches[12:]


def test_workers_change_nothing_and_a_resumed_run_sees_the_rest(build: Build) -> None:
    alone, helped = (build(cache="none", num_workers=workers) for workers in (0, 2))
    run = shown(alone, 5)
    assert same(shown(helped, 5), run)
    assert same(shown(alone, 3, done=2), run[2:])
    assert same(shown(helped, 3, done=2), run[2:])


def test_a_source_reaches_a_worker_that_is_not_forked(build: Build) -> None:
    source = build().source("train")
    there = pickle.loads(pickle.dumps(source))
    assert np.array_equal(
        there.read_batch(range(12), Form.square(16, 3))[0],
        source.read_batch(range(12), Form.square(16, 3))[0],
    )


@pytest.mark.parametrize("build", [name for name in READ if name != "litdata"], indirect=True)
def test_a_changed_copy_has_another_key(build: Build, tmp_path: Path) -> None:
    before = build().cache_key("val")
    assert build().cache_key("val") == before
    for file in tmp_path.rglob("*"):
        os.utime(file, (1, 1))
    assert build().cache_key("val") != before


@pytest.mark.parametrize("name", READ)
def test_a_copy_in_another_place_has_the_same_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (tiny(name, tmp_path / place, monkeypatch) for place in ("a", "b"))
    for file in (tmp_path / "b").rglob("*"):
        os.utime(file, (1, 1))
    images = identify_images(one())
    assert images == identify_images(other())
    assert images["train"] != images["val"]


@pytest.mark.parametrize("name", DATASETS)
def test_the_places_of_every_dataset_are_settings_of_later_stages(name: str) -> None:
    places = declared_places(f"{class_of(name).__module__}.{class_of(name).__qualname__}")
    assert {"cache", "cache_dir", "num_workers"} <= set(places)
    later = OmegaConf.load(ROOT / "conf" / "places" / "default.yaml")
    own = compose_config("stage=vqgan", f"data={name}").data
    assert set(places) <= set(later)
    assert set(places) <= set(own)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("mnist", "MNIST/raw/t10k-images-idx3-ubyte"),
        ("stl10", "stl10_binary/test_X.bin"),
    ],
)
def test_a_changed_file_of_one_split_leaves_the_key_of_the_other(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny(name, tmp_path, monkeypatch)
    before = build()
    keys = [before.cache_key(split) for split in ("train", "val")]
    os.utime(tmp_path / name / file, (1, 1))
    after = build()
    assert [
        after.cache_key(split) == key for split, key in zip(("train", "val"), keys, strict=True)
    ] == [
        True,
        False,
    ]


def test_cifar10_images_come_through_to_the_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = whole(tiny("cifar10", tmp_path, monkeypatch)(image_size=32), "val")
    assert np.array_equal(images.numpy(), painted(VAL, 32, 9).transpose(0, 3, 1, 2))


def test_mnist_images_come_through_to_the_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = whole(tiny("mnist", tmp_path, monkeypatch)(image_size=28, channels=1), "val")
    assert np.array_equal(images.numpy(), painted(VAL, 28, 1, 1).transpose(0, 3, 1, 2))


def test_stl10_stands_upright_and_unlabelled_images_train_with_minus_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = whole(tiny("stl10", tmp_path, monkeypatch)(image_size=96), "train")
    assert np.array_equal(images[8:].numpy(), painted([-1] * 4, 96, 2).transpose(0, 3, 1, 2))
    assert labels.tolist() == [*TRAIN[:8], -1, -1, -1, -1]


def test_flowers_swap_their_splits_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("flowers102", tmp_path, monkeypatch)
    plain, swapped = build(), build(swap=True)
    assert torch.equal(whole(plain, "train")[0], whole(swapped, "val")[0])
    assert torch.equal(whole(plain, "val")[0], whole(swapped, "train")[0])


def test_celeba_without_an_attribute_has_one_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny("celeba", tmp_path, monkeypatch)(attribute=None)
    assert set(whole(data, "train")[1].tolist()) == {0}
    assert data.classes == ["face"]


def test_celebas_attribute_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("celeba", tmp_path, monkeypatch)
    whole(build(attribute=None), "train")
    assert set(whole(build(attribute="Smiling"), "train")[1].tolist()) == {0, 1}


def test_an_unknown_attribute_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"data\.attribute=Smilling is none of CelebA's, did you mean Smiling\?"
    ):
        make_images(CelebA, attribute="Smilling")


def test_tiny_imagenets_classes_have_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny("tiny_imagenet", tmp_path, monkeypatch)()
    data.prepare_data()
    assert data.classes == ["goldfish", "tree frog, tree-frog", "cup"]


def test_ffhqs_official_split_is_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny("ffhq", tmp_path, monkeypatch)()
    names = [
        [data.source(split).image_name(i)[-9:-4] for i in range(data.size(split))]
        for split in ("train", "val")
    ]
    assert names[0] == [f"{n:05d}" for n in range(0, 60_000, 5_000)]
    assert names[1] == [f"{n:05d}" for n in range(60_000, 60_006)]


def test_a_part_of_ffhq_is_split_by_n_val_and_says_so(tmp_path: Path) -> None:
    write([tmp_path / f"{n:05d}.png" for n in range(6)], painted([0] * 6, 16, 0))
    with pytest.raises(
        InputError, match=r"holds 6 images of the numbers 00000 to 59999.* and 0 of .*data\.n_val="
    ):
        make_images(FFHQ, str(tmp_path))
    data = make_images(FFHQ, str(tmp_path), n_val=2)
    assert (len(data.source("train")), len(data.source("val"))) == (4, 2)


def test_a_part_of_ffhq_keeps_its_split_when_more_of_it_arrives(tmp_path: Path) -> None:
    write([tmp_path / f"{n:05d}.png" for n in range(10, 20)], painted([0] * 10, 16, 0))
    before = make_images(FFHQ, str(tmp_path), n_val=3)
    write([tmp_path / f"{n:05d}.png" for n in range(10)], painted([0] * 10, 16, 1))
    after = make_images(FFHQ, str(tmp_path), n_val=3, seed=9, **before.decisions())
    for split in ("train", "val"):
        arrived = {f"{n:05d}.png" for n in range(10)}
        assert set(after.source(split).names()) - arrived == set(before.source(split).names())


def test_ffhqs_official_split_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "split_at" not in tiny("ffhq", tmp_path, monkeypatch)().decisions()


def test_a_file_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tiny("ffhq", tmp_path, monkeypatch)
    write([tmp_path / "ffhq" / "me.png"], painted([0], 16, 5))
    with pytest.raises(InputError, match=r"me\.png is not called by its five-digit number"):
        build()


def test_imagenet_with_a_flat_val_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("imagenet", tmp_path, monkeypatch)
    for file in (tmp_path / "imagenet" / "val").rglob("*.JPEG"):
        file.rename(tmp_path / "imagenet" / "val" / file.name)
    with pytest.raises(InputError, match="val has images in no class folder; sort them"):
        build()


def test_imagenets_val_may_lack_a_class_but_have_none_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = tiny("imagenet", tmp_path, monkeypatch)
    val = tmp_path / "imagenet" / "val"
    shutil.rmtree(val / "n01")
    images, labels = whole(build(), "val")
    assert labels.tolist() == read_labels(images) == [0, 0, 2, 2]
    assert "has images of 2 of the 3 classes" in capsys.readouterr().err
    (val / "n02").rename(val / "n07")
    with pytest.raises(InputError, match="that the training images in .*train lack: n07"):
        build()


def test_imagenet_without_val_and_without_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write([tmp_path / "train" / "n00" / "0.JPEG"], painted([0], 16, 0))
    with pytest.raises(InputError, match="has no folder val; ImageNet lies in"):
        make_images(ImageNet, str(tmp_path))
    with pytest.raises(InputError, match=r"data=imagenet needs .*data\.root="):
        make_images(ImageNet)


@pytest.mark.parametrize("download", [False, True])
def test_an_exception_of_any_class_gets_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    class Odd(Exception):
        """An exception of no class that a program could list."""

    def fail(*_: Any, **__: Any) -> None:
        raise Odd("the first line\nand more")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    with pytest.raises(InputError, match=r"CIFAR10 .*\(Odd: the first line\).*data\.root=<folder>"):
        make_images(CIFAR10, root=str(tmp_path), download=download).prepare_data()


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_missing_dataset_that_may_not_be_downloaded_is_reported(
    name: str, tmp_path: Path
) -> None:
    kind = class_of(name)
    with pytest.raises(
        InputError, match=rf"no whole copy of {kind.__name__} in .*nowhere.*data\.download=true"
    ):
        make_images(
            kind, root=str(tmp_path / "nowhere"), download=False, cache_dir=str(tmp_path)
        ).prepare_data()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_failed_download_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setitem(sys.modules, "gdown", None)  # CelebA's, perhaps not installed
    kind = class_of(name)
    reason = "pip install gdown" if kind is CelebA else "Name or service not known"
    with pytest.raises(
        InputError,
        match=rf"{kind.__name__} can't be downloaded to .*{reason}.*put a copy .*data\.root=",
    ):
        make_images(kind, root=str(tmp_path), cache_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("stl10", "stl10_binary/unlabeled_X.bin"),
        ("flowers102", "flowers-102/setid.mat"),
        ("celeba", "celeba/list_attr_celeba.txt"),
        ("celeba", "celeba/list_eval_partition.txt"),
        ("tiny_imagenet", f"{TINY}/val/val_annotations.txt"),
    ],
)
def test_a_truncated_file_is_not_taken_for_whole(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny(name, tmp_path, monkeypatch)
    content = (tmp_path / name / file).read_bytes()
    (tmp_path / name / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="no whole copy"):
        build(download=False).prepare_data()


@pytest.mark.parametrize("name", ["flowers102", "celeba", "tiny_imagenet"])
def test_an_image_that_was_not_unpacked_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny(name, tmp_path, monkeypatch)
    source: Any = build().source("val")
    source.files[2].unlink()
    missing = source.files[2].name
    message = (
        f"{missing} can't be read"
        if name == "tiny_imagenet"
        else f"1 of 6 images are not in .*{missing}"
    )
    with pytest.raises(InputError, match=message):
        build(download=False).prepare_data()


def test_stl10s_checksum_is_computed_once_for_unchanged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("stl10", tmp_path, monkeypatch)
    first = whole(build(), "val")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", None)  # a second checksum would fail
    assert same([whole(build(), "val")], [first])


def test_a_changed_pixel_of_stl10_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("stl10", tmp_path, monkeypatch)
    file = tmp_path / "stl10" / "stl10_binary" / "unlabeled_X.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="no whole copy of STL10"):
        build(download=False).prepare_data()


def test_only_one_of_two_concurrent_runs_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("cifar10", tmp_path, monkeypatch)
    fetched = []

    def fetch(url: str, root: str, **_: Any) -> None:
        fetched.append(url)
        sleep(0.1)
        shutil.copytree(tmp_path / "cifar10", root, dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    runs = [build(root=str(tmp_path / "new")) for _ in range(2)]
    threads = [Thread(target=run.source, args=("val",)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert [len(run.source("val")) for run in runs] == [6, 6]


def zipped(tmp_path: Path, patch: pytest.MonkeyPatch) -> Build:
    """Tiny ImageNet with a fake download, which copies it as an archive."""
    build = tiny("tiny_imagenet", tmp_path, patch)
    archive = tmp_path / f"{TINY}.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "tiny_imagenet").rglob("*"):
            file.write(path, path.relative_to(tmp_path / "tiny_imagenet"))
    patch.setattr(
        "codegrid.data.layouts.download_url", lambda url, root, md5: shutil.copy(archive, root)
    )
    return build


def test_tiny_imagenet_is_downloaded_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = zipped(tmp_path, monkeypatch)
    new = build(root=str(tmp_path / "new"))
    assert same(
        [whole(new, split) for split in ("train", "val")],
        [whole(build(), split) for split in ("train", "val")],
    )


def test_a_full_disk_leaves_no_tiny_imagenet_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = zipped(tmp_path, monkeypatch)

    def half(archive: str, to: str) -> None:
        shutil.copytree(tmp_path / "tiny_imagenet" / TINY / "train", Path(to, TINY, "train"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("codegrid.data.layouts.extract_archive", half)
        with pytest.raises(
            InputError, match="TinyImageNet can't be downloaded .*No space left on device"
        ):
            build(root=str(tmp_path / "new")).prepare_data()
    assert not (tmp_path / "new" / TINY).exists()
    build(root=str(tmp_path / "new")).prepare_data()


def test_a_complete_copy_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tiny("cifar10", tmp_path, monkeypatch)
    before = sorted((tmp_path / "cifar10").rglob("*"))
    build().prepare_data()
    assert sorted((tmp_path / "cifar10").rglob("*")) == before  # not even a lock file is added


def test_every_downloaded_dataset_is_in_these_lists() -> None:
    classes = {
        kind
        for module in (codegrid.data.torchvision, codegrid.data.layouts)
        for kind in vars(module).values()
        if isinstance(kind, type)
    }
    downloaded = {kind for kind in classes if issubclass(kind, DownloadedDataModule)}
    assert downloaded - {DownloadedDataModule} == {class_of(name) for name in DOWNLOADED}


@pytest.mark.parametrize("kind", ["no answer", "half an answer"])
def test_a_download_from_a_network_that_falls_silent_gives_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.data.torchvision.SECONDS_OF_SILENCE", 0.2)
    with socket.create_server(("localhost", 0)) as server:
        url = f"http://localhost:{server.getsockname()[1]}/cifar.tar.gz"

        def answer() -> None:
            connection, _ = server.accept()
            if kind == "half an answer":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
            time.sleep(1)
            connection.close()

        def download(*arguments: Any, **settings: Any) -> None:
            if not settings["download"]:
                raise RuntimeError("Dataset not found")
            with urllib.request.urlopen(url) as response:
                response.read()

        threading.Thread(target=answer, daemon=True).start()
        data = make_images(CIFAR10, root=str(tmp_path), cache_dir=str(tmp_path))
        with pytest.raises(InputError, match=r"CIFAR10 can't be downloaded to .*timed out"):
            data.download_if_missing(download)
