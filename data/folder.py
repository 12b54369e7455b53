"""Folders of images, in class folders or flat."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.datamodule import ImageDataModule
from data.loading import count_cores
from data.source import FileSource, Source, hold_out
from data.store import Arrays, load_or_fill
from data.threads import map_in_threads
from engine.console import log_line
from engine.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test")


def find_images(root: Path) -> list[Path]:
    """All image files below a folder, recognised by their suffixes, in the order of their paths. Hidden files are left out.

    Links to folders are followed. Each folder is visited once, so that link cycles end, and links are visited after the
    real folders next to them, so that images keep their real paths. Folders that cannot be listed are logged.
    """
    images: list[Path] = []
    visited: set[tuple[int, int]] = set()

    def report(error: OSError) -> None:
        log_line(f"the folder {error.filename} can't be read ({error.strerror}) and is left out")

    for folder, subfolders, files in os.walk(root, onerror=report, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # os.walk visits what is left in the list, in its order.
        subfolders[:] = sorted(
            (name for name in subfolders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        images += [
            Path(folder, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(images, key=lambda file: file.parts)  # the order of paths, in half the time


def open_class_folders(root: Path) -> FileSource:
    """The image files below a folder, labelled by their class folders (the first level below it), or 0 in a flat folder."""
    files = find_images(root)
    if not files:
        raise InputError(
            f"{root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); give the folder that does"
        )
    depth = len(root.parts)
    names = [file.parts[depth] if len(file.parts) > depth + 1 else "" for file in files]
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return FileSource(root, files, [numbers[name] for name in names], classes)


def resolve_folder(root: str | None, setting: str, dataset: str) -> Path:
    """The existing folder that a setting names, with ~ expanded. Raises InputError if there is none."""
    if not root:
        raise InputError(
            f"data={dataset} needs the folder that holds the images; add {setting}=<folder>"
        )
    if not Path(root).expanduser().is_dir():
        raise InputError(f"{setting}={root} is not a folder; give the folder that holds the images")
    return Path(root).expanduser()


class Folder(ImageDataModule):
    """The images below `root`, of any format that Pillow reads, in class folders or flat.

    root       the folder
    val_root   folder of the validation images; None holds out `n_val` images of `root`
    n_val      number of images to hold out
    held_out   which ones: "random", drawn by `seed`, or the "last" in the order of their paths

    Training files with the same bytes as a validation file are left out.
    """

    place_settings = ("root", "val_root")

    def __init__(
        self,
        root: str | None,
        val_root: str | None,
        n_val: int,
        held_out: str,
        **image_settings: Any,
    ) -> None:
        super().__init__(**image_settings)
        self.root = resolve_folder(root, "data.root", "folder")
        self.val_root = resolve_folder(val_root, "data.val_root", "folder") if val_root else None
        self.title = self.root.resolve().name
        whole = open_class_folders(self.root)
        self._refuse_splits(root, whole.classes)
        if self.val_root:
            train, val = whole, open_class_folders(self.val_root)
            if differing := sorted(set(train.classes) ^ set(val.classes)):
                raise InputError(
                    f"data.root={root} and data.val_root={val_root} must have the same class folders; "
                    f"only one of them has images in {', '.join(name or 'no class folder' for name in differing[:5])}"
                )
        else:
            train_rows, val_rows = hold_out(len(whole), n_val, held_out, self.seed)
            train, val = whole.subset(train_rows), whole.subset(val_rows)
        self.classes = whole.classes
        self._splits = {"train": drop_copies(train, val, self.cache_dir), "val": val}

    def _refuse_splits(self, root: str | None, classes: list[str]) -> None:
        """Raise InputError if the class folders are in fact splits."""
        splits = sorted(
            (name for name in classes if name.lower() in SPLIT_FOLDERS),
            key=lambda name: SPLIT_FOLDERS.index(name.lower()),
        )
        if len(splits) > 1:
            raise InputError(
                f"data.root={root} holds the splits {', '.join(splits)}, which would be taken for classes; "
                f"give two of them, data.root={self.root / splits[0]} data.val_root={self.root / splits[1]}"
            )

    def open_source(self, split: str) -> Source:
        return self._splits[split]


def drop_copies(train: FileSource, val: FileSource, cache_dir: str) -> FileSource:
    """The training files whose content differs from all validation files. Only files of equal size are compared."""
    sizes = {size for size, _ in train.stamps} & {size for size, _ in val.stamps if size > 0}
    suspects, originals = (
        [i for i, (size, _) in enumerate(files.stamps) if size in sizes] for files in (train, val)
    )
    if not suspects:
        return train

    def fill(arrays: Arrays) -> None:
        num_threads = 4 + count_cores()  # they wait for the disk
        in_val = map_in_threads(_hash_file, (val.files[i] for i in originals), num_threads)
        known = set(in_val) - {None}
        in_train = map_in_threads(_hash_file, (train.files[i] for i in suspects), num_threads)
        digests = list(in_train)
        copies = [i for i, digest in zip(suspects, digests, strict=True) if digest in known]
        arrays["keep"][:] = True
        arrays["keep"][copies] = False

    spec = {"keep": ((len(train),), "bool")}
    arrays, _ = load_or_fill(cache_dir, "copies", [train.key, val.key], spec, fill)
    rows = np.flatnonzero(arrays["keep"])
    if len(rows) == len(train):
        return train
    if not len(rows):
        raise InputError(
            f"all {len(train):,} training images below {train.root} are copies of validation images; give others"
        )
    log_line(
        f"{len(train) - len(rows)} training images are copies of validation images and are left out"
    )
    return train.subset(rows)


def _hash_file(file: Path) -> bytes | None:
    """A hash of the content, None if the file cannot be read."""
    try:
        return hashlib.blake2b(file.read_bytes()).digest()
    except OSError:
        return None
