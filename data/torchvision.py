"""The datasets that torchvision downloads and verifies, in their official splits."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.decode import to_form
from codegrid.data.form import Form
from codegrid.data.source import FileSource, Source, file_stamp
from codegrid.data.store import fingerprint, load_or_fill
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, suggest, summarize_error
from codegrid.engine.locks import Lock
from codegrid.engine.network import limited_silence

Dataset = TypeVar("Dataset")

SECONDS_OF_SILENCE = 60.0  # after which a download gives up


class DownloadedDataModule(ImageDataModule):
    """A dataset in a folder of its own below `root`. If it is missing there, it is downloaded if `download` is true."""

    place_settings = ("root", "download")
    layout: str  # what lies below root, for users who put it there by hand

    def __init__(self, root: str, download: bool, **image_settings: Any) -> None:
        super().__init__(**image_settings)
        self.root = Path(root).expanduser()
        self.download = download

    def download_if_missing(self, make: Callable[..., Dataset]) -> Dataset:
        """`make(download=False)`, or `make(download=True)` if that raises because files are missing or incomplete.

        If several runs need the dataset, one downloads it while the others wait. Raises InputError if downloading is not
        allowed or fails.
        """
        name = type(self).__name__
        try:
            return make(download=False)
        except InputError:
            raise
        except (
            Exception
        ) as error:  # missing, truncated or changed: each format has its own exceptions
            if not self.download:
                raise InputError(
                    f"there is no whole copy of {name} in {self.root} ({_summarise(error)}); "
                    f"put one there ({self.layout}), name the folder that has one with data.root=<folder>, "
                    "or let it be downloaded with data.download=true"
                ) from error
        log_line(
            f"{name} is not in {self.root}; downloading it, or waiting for another run that does"
        )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            instead = f"put a copy there yourself ({self.layout})"
            lock = Lock(self.root / f".{name}.lock")
            with lock.wait(str(self.root / name), instead), limited_silence(SECONDS_OF_SILENCE):
                return make(download=True)
        except InputError:
            raise
        except Exception as error:  # of urllib, requests, gdown, tarfile, zipfile, the disk
            raise InputError(
                f"{name} can't be downloaded to {self.root} ({_summarise(error)}); try again after removing what is broken there, "
                f"put a copy there yourself ({self.layout}), or name a folder that has one with data.root=<folder>"
            ) from error

    def files_key(self, split: str, files: Iterable[Path]) -> dict[str, Any]:
        """The key of a source whose images lie in a few large files."""
        listing = [(str(file.relative_to(self.root)), *file_stamp(file)) for file in files]
        # The class name, not the title, because figures that are computed from the images are known by this key too.
        return {
            "dataset": type(self).__name__.lower(),
            "split": split,
            "root": str(self.root.resolve()),
            "files": fingerprint(listing),
        }


def unplaced_key(key: dict[str, Any], sizes: Iterable[int]) -> dict[str, Any]:
    """What a copy in another folder has in common with a key of `files_key`, whose files have these sizes."""
    return {"dataset": key["dataset"], "split": key["split"], "sizes": list(sizes)}


def _summarise(error: Exception) -> str:
    """`summarize_error` without torchvision's advice, which names no setting of ours."""
    return summarize_error(error).split(". You can use download=True")[0]


class InMemorySource(Source):
    """Images that a torchvision dataset holds in memory."""

    checked_up_front = False  # images in memory cannot break

    def __init__(self, dataset: Any, key: dict[str, Any]) -> None:
        super().__init__(len(dataset), key)
        self.content_key = unplaced_key(key, [self.n])  # torchvision has verified the checksums
        self.dataset = dataset

    def read_image(self, index: int, form: Form) -> tuple[NDArray[np.uint8], int]:
        image, label = self.dataset[index]
        return to_form(image, form, self.rules), int(label)


class CIFAR10(DownloadedDataModule):
    """50,000 images of 32x32 pixels in ten classes; validation uses the 10,000 of the test set (Krizhevsky 2009)."""

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

    def open_source(self, split: str) -> Source:
        make = partial(datasets.CIFAR10, str(self.root), split == "train")
        dataset = self.download_if_missing(make)
        batches = dataset.train_list if split == "train" else dataset.test_list
        files = [self.root / dataset.base_folder / name for name, _ in batches]
        return InMemorySource(dataset, self.files_key(split, files))


class MNIST(DownloadedDataModule):
    """60,000 grey digits of 28x28 pixels; validation uses the 10,000 of the test set (LeCun et al. 1998)."""

    layout = "MNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k"
    classes = datasets.MNIST.classes
    kind = datasets.MNIST

    def open_source(self, split: str) -> Source:
        # Unpacked files have no checksums, but a truncated file has too few bytes for its header and is refused.
        dataset = self.download_if_missing(partial(self.kind, str(self.root), split == "train"))
        stem = "train" if split == "train" else "t10k"
        names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
        files = [Path(dataset.raw_folder, name) for name in names]
        return InMemorySource(dataset, self.files_key(split, files))


class FashionMNIST(MNIST):
    """60,000 grey articles of clothing of 28x28 pixels; validation uses the 10,000 of the test set (Xiao et al. 2017)."""

    title = "fashion_mnist"
    layout = MNIST.layout.replace("MNIST", "FashionMNIST")
    classes = datasets.FashionMNIST.classes
    kind = datasets.FashionMNIST


class STL10Source(Source):
    """The files of STL10: images (n, 3, 96, 96), column by column, and labels from 1 on. Its second file of images, if it
    has one, is unlabelled.

    The files are memory maps, because the unlabelled images alone take 2.8 GB. Raises ValueError if a file has a wrong size.
    """

    checked_up_front = False

    def __init__(self, images: list[Path], labels: Path, key: dict[str, Any]) -> None:
        self.parts = [np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96) for file in images]
        known = np.fromfile(labels, np.uint8).astype(np.int64) - 1
        if len(known) != len(self.parts[0]):
            raise ValueError(f"{len(self.parts[0])} images, {len(known)} labels")
        super().__init__(sum(map(len, self.parts)), key)
        self.content_key = unplaced_key(key, [file.stat().st_size for file in (*images, labels)])
        self.labels: NDArray[np.int64] = np.full(self.n, -1)
        self.labels[: len(known)] = known
        self.arguments = images, labels, key

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its file names, so that a worker that is not forked does not get 2.8 GB through a pipe."""
        return STL10Source, self.arguments

    def read_image(self, index: int, form: Form) -> tuple[NDArray[np.uint8], int]:
        first = len(self.parts[0])
        columns = self.parts[0][index] if index < first else self.parts[1][index - first]
        image = Image.fromarray(columns.transpose(2, 1, 0))
        return to_form(image, form), int(self.labels[index])


class STL10(DownloadedDataModule):
    """105,000 images of 96x96 pixels; validation uses the 8,000 of the test set (Coates et al. 2011).

    5,000 of the training images and all of the test set belong to one of ten classes; the others have the label -1.
    """

    layout = (
        "stl10_binary/ with train_X.bin, train_y.bin, unlabeled_X.bin, test_X.bin and test_y.bin"
    )
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

    def open_source(self, split: str) -> Source:
        folder = self.root / datasets.STL10.base_folder
        names = ["train_X.bin", "unlabeled_X.bin"] if split == "train" else ["test_X.bin"]
        images = [folder / name for name in names]
        labels = folder / ("train_y.bin" if split == "train" else "test_y.bin")

        def make(download: bool) -> Source:
            verify = partial(datasets.STL10, str(self.root), "test", download=download)
            if download:
                verify()
            source = STL10Source(images, labels, self.files_key(split, [*images, labels]))
            # The checksum of 3 GB takes seconds, so it is computed once for unchanged files.
            name = f"stl10-{split}-verified"
            load_or_fill(self.cache_dir, name, source.key, {}, lambda _: len(verify()))
            return source

        return self.download_if_missing(make)


class Flowers102(DownloadedDataModule):
    """8,189 photographs of flowers in 102 classes (Nilsback and Zisserman 2008).

    Training uses the 2,040 images of the official train and val sets and validation the 6,149 of the test set, as in the
    literature on classification. With `swap` it is the other way round, because 2,040 images are few to train on.
    """

    layout = "flowers-102/ with jpg/image_00001.jpg and so on, imagelabels.mat and setid.mat"
    classes = datasets.Flowers102.classes

    def __init__(self, swap: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.swap = swap

    def open_source(self, split: str) -> Source:
        sets = ("trnid", "valid") if (split == "train") != self.swap else ("tstid",)

        def make(download: bool) -> Source:
            datasets.Flowers102(str(self.root), download=download)  # verifies the two lists
            folder = self.root / "flowers-102"
            ids = np.sort(np.concatenate([loadmat(folder / "setid.mat")[name][0] for name in sets]))
            labels = loadmat(folder / "imagelabels.mat")["labels"][0][ids - 1].astype(int) - 1
            names = [f"image_{number:05d}.jpg" for number in ids]
            return open_listed_files(folder / "jpg", names, labels.tolist(), self.classes)

        return self.download_if_missing(make)


class CelebA(DownloadedDataModule):
    """162,770 aligned faces of 178x218 pixels; validation uses the official 19,867 (Liu et al. 2015).

    The label is 1 for faces with `attribute`, one of CELEBA_ATTRIBUTES, else 0. If `attribute` is None, all labels are 0.
    """

    layout = "celeba/ with img_align_celeba/000001.jpg and so on, list_eval_partition.txt and list_attr_celeba.txt"

    def __init__(self, attribute: str | None, **settings: Any) -> None:
        super().__init__(**settings)
        if attribute is not None and attribute not in CELEBA_ATTRIBUTES:
            raise InputError(
                f"data.attribute={attribute} is none of CelebA's{suggest(attribute, CELEBA_ATTRIBUTES)}; "
                f"there is {', '.join(CELEBA_ATTRIBUTES)}"
            )
        self.attribute = attribute
        self.classes = ["face"] if attribute is None else [f"not {attribute}", attribute]

    def open_source(self, split: str) -> Source:
        # torchvision parses all five text files for 12 seconds, and only two columns are needed.
        def make(download: bool) -> Source:
            if download:
                datasets.CelebA(str(self.root), download=True)
            self._verify_lists()
            folder = self.root / "celeba"
            names = self._list_names(folder, split)
            positive = self._list_positive(folder)
            labels = [int(name in positive) for name in names]
            return open_listed_files(folder / "img_align_celeba", names, labels, self.classes)

        return self.download_if_missing(make)

    def _verify_lists(self) -> None:
        """Raise ValueError if a list that is read here differs from the published one."""
        lists = ["list_eval_partition.txt"]
        if self.attribute is not None:
            lists.append("list_attr_celeba.txt")
        md5s = {name: md5 for _, md5, name in datasets.CelebA.file_list}
        folder = self.root / "celeba"
        changed = [name for name in lists if not check_integrity(folder / name, md5s[name])]
        if changed:
            raise ValueError(f"{', '.join(changed)} is missing or not as published")

    @staticmethod
    def _list_names(folder: Path, split: str) -> list[str]:
        """The names of the files of a split."""
        number = "0" if split == "train" else "1"
        lines = (folder / "list_eval_partition.txt").read_text().splitlines()
        return [name for name, part in map(str.split, lines) if part == number]

    def _list_positive(self, folder: Path) -> set[str]:
        """The names of the files of faces that have the attribute."""
        if self.attribute is None:
            return set()
        _, header, *lines = (folder / "list_attr_celeba.txt").read_text().splitlines()
        column = header.split().index(self.attribute) + 1
        rows = map(str.split, lines)
        return {row[0] for row in rows if row[column] == "1"}


def open_listed_files(
    folder: Path, names: list[str], labels: list[int], classes: list[str]
) -> FileSource:
    """The files that an index names. Raises FileNotFoundError if some are missing, as after an interrupted unpacking."""
    files = FileSource(folder, [folder / name for name in names], labels, classes)
    missing = [name for name, (size, _) in zip(names, files.stamps, strict=True) if size < 0]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(names):,} images are not in {folder}, as {missing[0]}"
        )
    return files


CELEBA_ATTRIBUTES = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee",
    "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard",
    "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair",
    "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
]  # fmt: skip
