"""The datasets that torchvision fetches and verifies, in their official splits."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from data.datamodule import ImageDataModule
from data.decode import square
from data.source import Files, Source, stamp
from data.store import fingerprint, stored
from engine.cli import suggest
from engine.console import log_line
from engine.errors import InputError

Dataset = TypeVar("Dataset")


class Downloaded(ImageDataModule):
    """A dataset in a folder of its own below `root`. Where it is missing there, it is fetched, if `download` allows it."""

    layout: str  # what lies below root, for whoever puts it there by hand

    def __init__(self, root: str = "datasets", download: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.root, self.download = Path(root).expanduser(), download

    def fetched(self, make: Callable[..., Dataset]) -> Dataset:
        """`make(download=False)`, or `make(download=True)` where that raises because something is missing or not whole.

        Of several runs one fetches while the others wait. InputError where nothing is to be fetched, or can't be.
        """
        name = type(self).__name__
        try:
            return make(download=False)
        except InputError:
            raise
        except (
            Exception
        ) as error:  # missing, cut short or changed: each format has exceptions of its own
            if not self.download:
                raise InputError(
                    f"there is no whole copy of {name} in {self.root} ({_reason(error)}); put one there ({self.layout}), name the "
                    "folder that has one with data.root=<folder>, or let it be downloaded with data.download=true"
                ) from error
        log_line(
            f"{name} is not in {self.root}; downloading it, or waiting for another run that does"
        )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{name}.lock"):
                return make(download=True)
        except InputError:
            raise
        except Exception as error:  # of urllib, requests, gdown, tarfile, zipfile, the disk
            raise InputError(
                f"{name} can't be downloaded to {self.root} ({_reason(error)}); try again after removing what is broken there, "
                f"put a copy there yourself ({self.layout}), or name a folder that has one with data.root=<folder>"
            ) from error

    def key_of(self, split: str, files: Iterable[Path]) -> dict[str, Any]:
        """A source's key where all images of a split lie in a few large files."""
        listing = [(str(file.relative_to(self.root)), *stamp(file)) for file in files]
        name = (
            type(self).__name__.lower()
        )  # not the title: what is made of the images, scores too, is known by their key
        return {
            "dataset": name,
            "split": split,
            "root": str(self.root.resolve()),
            "files": fingerprint(listing),
        }


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split()).split(". You can use download=True")[
        0
    ]  # that is no setting here
    return said[:200] or type(error).__name__


class Held(Source):
    """Images that a dataset of torchvision holds in memory, where nothing can break any more."""

    checked = False  # one by one

    def __init__(self, dataset: Any, key: dict[str, Any]) -> None:
        super().__init__(len(dataset), key)
        self.dataset = dataset

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        image, label = self.dataset[index]
        return square(image, side, channels), int(label)


class CIFAR10(Downloaded):
    """50,000 images of 32x32 pixels in ten classes; the 10,000 of the test set validate (Krizhevsky 2009)."""

    layout = "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta"
    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]

    def open(self, split: str) -> Source:
        dataset = self.fetched(partial(datasets.CIFAR10, str(self.root), split == "train"))
        batches = dataset.train_list if split == "train" else dataset.test_list
        return Held(
            dataset,
            self.key_of(split, [self.root / dataset.base_folder / name for name, _ in batches]),
        )


class MNIST(Downloaded):
    """60,000 grey digits of 28x28 pixels; the 10,000 of the test set validate (LeCun et al. 1998)."""

    layout = "MNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k"
    classes = datasets.MNIST.classes
    kind = datasets.MNIST

    def open(self, split: str) -> Source:
        # What torchvision unpacks has no sums; a file that was cut short has too few bytes for its header and is refused.
        dataset = self.fetched(partial(self.kind, str(self.root), split == "train"))
        stem = "train" if split == "train" else "t10k"
        files = [
            Path(dataset.raw_folder, f"{stem}-{what}-ubyte")
            for what in ("images-idx3", "labels-idx1")
        ]
        return Held(dataset, self.key_of(split, files))


class FashionMNIST(MNIST):
    """60,000 grey articles of clothing of 28x28 pixels; the 10,000 of the test set validate (Xiao et al. 2017)."""

    title = "fashion_mnist"
    layout = MNIST.layout.replace("MNIST", "FashionMNIST")
    classes = datasets.FashionMNIST.classes
    kind = datasets.FashionMNIST


class Columns(Source):
    """STL10's files: images (n, 3, 96, 96) column by column, and labels from 1 on, which the last file of images may lack.

    They are mapped, not read: the unlabelled images alone are 2.8 GB. ValueError where a file's size can't be right.
    """

    checked = False

    def __init__(self, images: list[Path], labels: Path, key: dict[str, Any]) -> None:
        self.parts = [np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96) for file in images]
        known = np.fromfile(labels, np.uint8).astype(np.int64) - 1
        if len(known) != len(self.parts[0]):
            raise ValueError(f"{len(self.parts[0])} images, {len(known)} labels")
        super().__init__(sum(map(len, self.parts)), key)
        self.labels = np.full(self.n, -1)
        self.labels[: len(known)] = known
        self.made_of = images, labels, key

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # or a worker that is not forked would get the 2.8 GB through a pipe
        return Columns, self.made_of

    def one(self, index: int, side: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        first = len(self.parts[0])
        columns = self.parts[0][index] if index < first else self.parts[1][index - first]
        return square(Image.fromarray(columns.transpose(2, 1, 0)), side, channels), int(
            self.labels[index]
        )


class STL10(Downloaded):
    """105,000 images of 96x96 pixels; the 8,000 of the test set validate (Coates et al. 2011).

    5,000 of the training images and all of the test set are of one of ten classes, the others have the label -1.
    """

    layout = (
        "stl10_binary/ with train_X.bin, train_y.bin, unlabeled_X.bin, test_X.bin and test_y.bin"
    )
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

    def open(self, split: str) -> Source:
        folder = self.root / datasets.STL10.base_folder
        names = ["train_X.bin", "unlabeled_X.bin"] if split == "train" else ["test_X.bin"]
        images, labels = (
            [folder / name for name in names],
            folder / ("train_y.bin" if split == "train" else "test_y.bin"),
        )

        def make(download: bool) -> Source:
            verify = partial(datasets.STL10, str(self.root), "test", download=download)
            if download:
                verify()
            source = Columns(images, labels, self.key_of(split, [*images, labels]))
            # Summing up 3 GB takes seconds: once for files that stay as they are.
            stored(
                self.cache_dir, f"stl10-{split}-verified", source.key, {}, lambda _: len(verify())
            )
            return source

        return self.fetched(make)


class Flowers102(Downloaded):
    """8,189 photographs of flowers in 102 classes (Nilsback and Zisserman 2008).

    The 2,040 of the official train and val sets train and the 6,149 of the test set validate, as in the literature on
    classification. That is little to train on: with `swap` the 6,149 train and the 2,040 validate.
    """

    layout = "flowers-102/ with jpg/image_00001.jpg and so on, imagelabels.mat and setid.mat"
    classes = datasets.Flowers102.classes

    def __init__(self, swap: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.swap = swap

    def open(self, split: str) -> Source:
        sets = ("trnid", "valid") if (split == "train") != self.swap else ("tstid",)

        def make(download: bool) -> Source:
            datasets.Flowers102(str(self.root), download=download)  # verifies the two lists
            folder = self.root / "flowers-102"
            ids = np.sort(np.concatenate([loadmat(folder / "setid.mat")[name][0] for name in sets]))
            labels = loadmat(folder / "imagelabels.mat")["labels"][0][ids - 1].astype(int) - 1
            return listed(
                folder / "jpg",
                [f"image_{number:05d}.jpg" for number in ids],
                labels.tolist(),
                self.classes,
            )

        return self.fetched(make)


class CelebA(Downloaded):
    """162,770 aligned faces of 178x218 pixels; the 19,867 of the official validation set validate (Liu et al. 2015).

    The label is 1 where a face has `attribute`, one of ATTRIBUTES; without one all labels are 0.
    """

    layout = "celeba/ with img_align_celeba/000001.jpg and so on, list_eval_partition.txt and list_attr_celeba.txt"

    def __init__(self, attribute: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if attribute is not None and attribute not in ATTRIBUTES:
            raise InputError(
                f"data.attribute={attribute} is none of CelebA's{suggest(attribute, ATTRIBUTES)}; there is {', '.join(ATTRIBUTES)}"
            )
        self.attribute = attribute
        self.classes = ["face"] if attribute is None else [f"not {attribute}", attribute]

    def open(self, split: str) -> Source:
        lists = ["list_eval_partition.txt"] + ["list_attr_celeba.txt"] * (
            self.attribute is not None
        )
        sums = {name: md5 for _, md5, name in datasets.CelebA.file_list}

        # torchvision parses all five text files for 12 seconds, where two columns are wanted.
        def make(download: bool) -> Source:
            if download:
                datasets.CelebA(str(self.root), download=True)
            folder, number = self.root / "celeba", "0" if split == "train" else "1"
            if changed := [
                name for name in lists if not check_integrity(folder / name, sums[name])
            ]:
                raise ValueError(f"{', '.join(changed)} is missing or not as published")
            lines = [
                line.split()
                for line in (folder / "list_eval_partition.txt").read_text().splitlines()
            ]
            names, labels = [name for name, part in lines if part == number], {}
            if self.attribute:
                _, header, *rows = (folder / "list_attr_celeba.txt").read_text().splitlines()
                column = header.split().index(self.attribute) + 1
                labels = {(words := row.split())[0]: int(words[column] == "1") for row in rows}
            return listed(
                folder / "img_align_celeba",
                names,
                [labels[name] if labels else 0 for name in names],
                self.classes,
            )

        return self.fetched(make)


def listed(folder: Path, names: list[str], labels: list[int], classes: list[str]) -> Files:
    """The files that an index names; FileNotFoundError where some are missing, as after unpacking that was broken off."""
    files = Files(folder, [folder / name for name in names], labels, classes)
    if missing := [name for name, (size, _) in zip(names, files.stamps, strict=True) if size < 0]:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(names):,} images are not in {folder}, as {missing[0]}"
        )
    return files


ATTRIBUTES = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee",
    "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard",
    "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair",
    "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
]  # fmt: skip
