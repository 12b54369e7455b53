"""Datasets that torchvision doesn't fetch, in the folders that they come in."""

import os
import re
import shutil
from functools import partial
from typing import Any

import numpy as np
from torchvision.datasets.utils import download_url, extract_archive

from data.datamodule import ImageDataModule
from data.folder import class_images, describe_folders, find_images
from data.source import Files, Source, hold_out
from data.torchvision import Downloaded
from engine.errors import InputError

FIRST_VAL = 60_000  # FFHQ's first validation image
TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class TinyImageNet(Downloaded):
    """100,000 images of 64x64 pixels in 200 classes of ImageNet; the 10,000 of the official validation set validate.

    The labels of its test set were never published. From Stanford's course CS231n (Le and Yang 2015).
    """

    title = "tiny_imagenet"
    layout = f"{TINY}/ with train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt, wnids.txt and words.txt"

    def open(self, split: str) -> Source:
        source = self.fetched(partial(self._read, split))
        self.classes = source.classes
        return source

    def _read(self, split: str, download: bool) -> Files:
        folder = self.root / TINY
        if download and not folder.exists():
            part = self.root / f".{TINY}.part"  # the folder gets its name when it is complete
            shutil.rmtree(part, ignore_errors=True)
            download_url(TINY_URL, str(self.root), md5=TINY_MD5)
            extract_archive(str(self.root / f"{TINY}.zip"), str(part))
            os.replace(part / TINY, folder)
            part.rmdir()
        wnids = sorted((folder / "wnids.txt").read_text().split())
        words = dict(
            line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines()
        )
        classes, numbers = (
            [words[wnid] for wnid in wnids],
            {wnid: number for number, wnid in enumerate(wnids)},
        )
        if split == "train":
            files = sorted((folder / "train").glob("*/images/*.JPEG"))
            kinds = [file.parts[-3] for file in files]
        else:
            rows = [
                line.split("\t")
                for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()
            ]
            files, kinds = (
                [folder / "val" / "images" / row[0] for row in rows],
                [row[1] for row in rows],
            )
            if len(files) < len(list((folder / "val" / "images").glob("*.JPEG"))):
                raise ValueError("val/val_annotations.txt does not name all images")
        if set(kinds) != set(wnids):
            raise ValueError(
                f"{folder} has {split} images of {len(set(kinds))} classes, not {len(wnids)}"
            )
        return Files(folder, files, [numbers[kind] for kind in kinds], classes)


class ImageNet(ImageDataModule):
    """1,281,167 photographs in 1,000 classes; the 50,000 of the official validation set validate (Russakovsky et al. 2015).

    It is not downloaded: its owners want to be asked. Both splits lie in class folders, root/{train,val}/<wnid>/*.JPEG.
    """

    def __init__(self, root: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        folder = describe_folders(root, "data.root", "imagenet")
        self._parts = {}
        for split in ("train", "val"):
            if not (folder / split).is_dir():
                raise InputError(
                    f"data.root={root} has no folder {split}; ImageNet lies in train/<wnid>/ and val/<wnid>/"
                )
            self._parts[split] = class_images(folder / split)
            if "" in self._parts[split].classes:
                raise InputError(
                    f"{folder / split} has images in no class folder; sort them into folders named by their wnid, "
                    f"as {folder / split}/n01440764/"
                )
        train, val = self._parts["train"].classes, self._parts["val"].classes
        if differ := sorted(set(train) ^ set(val)):
            raise InputError(
                f"train and val in data.root={root} must have the same class folders; {len(differ)} are in one of them only, "
                f"as {differ[0]}"
            )
        self.classes = train

    def open(self, split: str) -> Source:
        return self._parts[split]


class FFHQ(ImageDataModule):
    """70,000 aligned faces, of which those from number 60000 on validate (Karras et al. 2019).

    They are called by their number, root/00000.png or root/00000/00000.png, in any size. It is not downloaded: it comes
    from a drive with a quota. Of a copy that holds less of it, `n_val` images are held out as in data/folder.py.
    """

    classes = ["face"]

    def __init__(
        self,
        root: str | None = None,
        n_val: int | None = None,
        held_out: str = "random",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = describe_folders(root, "data.root", "ffhq")
        files = find_images(self.root)
        if n_val is not None:
            parts = hold_out(len(files), n_val, held_out, self.seed)
        else:
            if strange := next(
                (file for file in files if not re.fullmatch(r"\d{5}", file.stem)), None
            ):
                raise InputError(
                    f"{strange} is not called by its five-digit number, which says what split it is of; "
                    "hold out some images instead with data.n_val=1000"
                )
            numbers = np.array([int(file.stem) for file in files])
            parts = np.flatnonzero(numbers < FIRST_VAL), np.flatnonzero(numbers >= FIRST_VAL)
            if not all(map(len, parts)):
                raise InputError(
                    f"data.root={root} holds {len(parts[0])} images of the numbers 00000 to 59999, which train, and "
                    f"{len(parts[1])} of those that validate; hold out some of them instead with data.n_val=1000"
                )
        self._parts = {
            split: Files(self.root, [files[i] for i in rows], [0] * len(rows), self.classes)
            for split, rows in zip(("train", "val"), parts, strict=True)
        }

    def open(self, split: str) -> Source:
        return self._parts[split]
