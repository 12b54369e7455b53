"""Datasets that torchvision does not download, in the folder layouts that they are published in."""

import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets.utils import download_url, extract_archive

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.folder import (
    TableDataModule,
    find_images,
    match_classes,
    open_class_folders,
    resolve_folder,
)
from codegrid.data.source import FileSource, Source
from codegrid.data.torchvision import DownloadedDataModule
from codegrid.engine.errors import InputError

FFHQ_FIRST_VAL = 60_000  # number of the first validation image
TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class TinyImageNet(DownloadedDataModule):
    """100,000 images of 64x64 pixels in 200 classes of ImageNet; validation uses the 10,000 of the official validation set.

    The labels of its test set were never published. From Stanford's course CS231n (Le and Yang 2015).
    """

    title = "tiny_imagenet"
    layout = f"{TINY}/ with train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt, wnids.txt and words.txt"

    def open_source(self, split: str) -> Source:
        source = self.download_if_missing(partial(self._open_files, split))
        self.classes = source.classes
        return source

    def _open_files(self, split: str, download: bool) -> FileSource:
        folder = self.root / TINY
        if download and not folder.exists():
            self._download()
        wnids = sorted((folder / "wnids.txt").read_text().split())
        lines = (folder / "words.txt").read_text().splitlines()
        words = dict(line.split("\t", 1) for line in lines)
        numbers = {wnid: number for number, wnid in enumerate(wnids)}
        files, file_wnids = self._list_files(folder, split)
        if set(file_wnids) != set(wnids):
            raise ValueError(
                f"{folder} has {split} images of {len(set(file_wnids))} classes, not {len(wnids)}"
            )
        labels = [numbers[wnid] for wnid in file_wnids]
        return FileSource(folder, files, labels, [words[wnid] for wnid in wnids])

    def _download(self) -> None:
        """Download and unpack the archive. The folder gets its name when it is complete."""
        part = self.root / f".{TINY}.part"
        shutil.rmtree(part, ignore_errors=True)
        download_url(TINY_URL, str(self.root), md5=TINY_MD5)
        extract_archive(str(self.root / f"{TINY}.zip"), str(part))
        os.replace(part / TINY, self.root / TINY)
        part.rmdir()

    @staticmethod
    def _list_files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
        """The files of a split and the WordNet id of the class of each."""
        if split == "train":
            files = sorted((folder / "train").glob("*/images/*.JPEG"))
            return files, [file.parts[-3] for file in files]
        images = folder / "val" / "images"
        lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        if len(rows) < len(list(images.glob("*.JPEG"))):
            raise ValueError("val/val_annotations.txt does not name all images")
        return [images / row[0] for row in rows], [row[1] for row in rows]


class ImageNet(ImageDataModule):
    """1,281,167 photographs in 1,000 classes; validation uses the official 50,000 (Russakovsky et al. 2015).

    It is not downloaded, because its owners require registration. Both splits lie in class folders,
    root/{train,val}/<wnid>/*.JPEG.
    """

    place_settings = ("root",)

    def __init__(self, root: str | None, **image_settings: Any) -> None:
        super().__init__(**image_settings)
        folder = resolve_folder(root, "data.root", "imagenet")
        self._splits = {}
        for split in ("train", "val"):
            if not (folder / split).is_dir():
                raise InputError(
                    f"data.root={root} has no folder {split}; ImageNet lies in train/<wnid>/ and val/<wnid>/"
                )
            self._splits[split] = open_class_folders(folder / split)
            if "" in self._splits[split].classes:
                raise InputError(
                    f"{folder / split} has images in no class folder; sort them into folders named by their wnid, "
                    f"as {folder / split}/n01440764/"
                )
        train = self._splits["train"]
        self._splits["val"] = match_classes(self._splits["val"], train)
        self.classes = train.classes

    def open_source(self, split: str) -> Source:
        return self._splits[split]


class FFHQ(TableDataModule):
    """70,000 aligned faces; those from number 60000 on validate (Karras et al. 2019).

    Files are named by their number, root/00000.png or root/00000/00000.png, and may have any size. FFHQ is not downloaded,
    because it lies on a drive with a quota. `n_val` images of an incomplete copy can be held out as in data/folder.py. Without a
    table of labels all are of one class.
    """

    classes = ["face"]
    place_settings = ("root",)

    def __init__(
        self, root: str | None, n_val: int | None, held_out: str, **image_settings: Any
    ) -> None:
        super().__init__(**image_settings)
        self.root = resolve_folder(root, "data.root", "ffhq")
        files = find_images(self.root)
        self.labelling.check(has_val_root=False)
        [whole] = self.read_table(FileSource(self.root, files, [0] * len(files), self.classes))
        self.classes = whole.classes
        if n_val is None:
            rows = self._split_by_number(whole.files, root)
        else:
            rows = self.hold_out(whole.names(), n_val, held_out)
        self._splits = {
            split: whole.subset(part) for split, part in zip(("train", "val"), rows, strict=True)
        }

    @staticmethod
    def _split_by_number(
        files: list[Path], root: str | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The indices of the training and of the validation files. Raises InputError for other names or an empty split."""
        unnumbered = [file for file in files if not re.fullmatch(r"\d{5}", file.stem)]
        if unnumbered:
            raise InputError(
                f"{unnumbered[0]} is not called by its five-digit number, which says what split it is of; "
                "hold out some images instead with data.n_val=1000"
            )
        numbers = np.array([int(file.stem) for file in files])
        train = np.flatnonzero(numbers < FFHQ_FIRST_VAL)
        val = np.flatnonzero(numbers >= FFHQ_FIRST_VAL)
        if not len(train) or not len(val):
            raise InputError(
                f"data.root={root} holds {len(train)} images of the numbers 00000 to 59999, which train, and "
                f"{len(val)} of those that validate; hold out some of them instead with data.n_val=1000"
            )
        return train, val

    def open_source(self, split: str) -> Source:
        return self._splits[split]
