"""Any folder of images, in class folders or flat."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.datamodule import ImageDataModule
from data.source import Files, Source, hold_out
from data.store import Arrays, stored
from engine.console import log_line
from engine.errors import InputError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test")


def find_images(root: Path) -> list[Path]:
    """All image files below a folder, by their endings, in the order of their paths; names that begin with a dot are left out.

    Links to folders are followed, each folder once, so that a link to a folder above ends, and in a folder they come
    last, so that images keep their own names; what can't be listed is told.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def complain(error: OSError) -> None:
        log_line(f"the folder {error.filename} can't be read ({error.strerror}) and is left out")

    for folder, below, files in os.walk(root, onerror=complain, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names = [name for name in below if not name.startswith(".")]
        below[:] = sorted(
            names, key=lambda name: (os.path.islink(os.path.join(folder, name)), name)
        )
        found += [
            Path(folder, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in ENDINGS
        ]
    return sorted(found, key=lambda file: file.parts)  # as they compare, in half the time


def class_images(root: Path) -> Files:
    """The image files below a folder, labelled by the number of their class folder (the first below it), 0 in a flat one."""
    files = find_images(root)
    if not files:
        raise InputError(
            f"{root} holds no image ({', '.join(sorted(ENDINGS))}); give the folder that does"
        )
    depth = len(root.parts)
    kinds = [file.parts[depth] if len(file.parts) > depth + 1 else "" for file in files]
    classes = sorted(set(kinds))
    numbers = {kind: number for number, kind in enumerate(classes)}
    return Files(root, files, [numbers[kind] for kind in kinds], classes)


def describe_folders(root: str | None, setting: str, what: str) -> Path:
    """The folder that a setting names, or a sentence."""
    if not root:
        raise InputError(
            f"data={what} needs the folder that holds the images; add {setting}=<folder>"
        )
    if not Path(root).expanduser().is_dir():
        raise InputError(f"{setting}={root} is not a folder; give the folder that holds the images")
    return Path(root).expanduser()


class Folder(ImageDataModule):
    """The images below `root`: any file that Pillow reads, in class folders or flat (see `images_of` and data/decode.py).

    Validation images are those below `val_root`; without it `n_val` of the images of `root` are held out: "random" ones,
    drawn by `seed`, or the "last" in the order of their paths. A training file with the same bytes as a validation file
    is left out of training.
    """

    def __init__(
        self,
        root: str | None,
        val_root: str | None = None,
        n_val: int = 1_000,
        held_out: str = "random",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = describe_folders(root, "data.root", "folder")
        self.val_root = describe_folders(val_root, "data.val_root", "folder") if val_root else None
        self.title = self.root.resolve().name
        whole = class_images(self.root)
        splits = sorted(
            (name for name in whole.classes if name.lower() in SPLIT_FOLDERS),
            key=lambda name: SPLIT_FOLDERS.index(name.lower()),
        )
        if len(splits) > 1:
            raise InputError(
                f"data.root={root} holds the splits {', '.join(splits)}, which would be taken for classes; "
                f"give two of them, data.root={self.root / splits[0]} data.val_root={self.root / splits[1]}"
            )
        if self.val_root:
            train, val = whole, class_images(self.val_root)
            if odd := sorted(set(train.classes) ^ set(val.classes)):
                raise InputError(
                    f"data.root={root} and data.val_root={val_root} must have the same class folders; "
                    f"only one of them has images in {', '.join(name or 'no class folder' for name in odd[:5])}"
                )
        else:
            rows, held = hold_out(len(whole), n_val, held_out, self.seed)
            train, val = whole.part(rows), whole.part(held)
        self.classes = whole.classes
        self._parts = {"train": without_copies(train, val, self.cache_dir), "val": val}

    def open(self, split: str) -> Source:
        return self._parts[split]


def without_copies(train: Files, val: Files, cache_dir: str) -> Files:
    """The training files whose bytes are not also those of a validation file. Only files of equal size are compared."""
    sizes = {size for size, _ in train.stamps} & {size for size, _ in val.stamps if size > 0}
    alike, held = (
        [i for i, (size, _) in enumerate(files.stamps) if size in sizes] for files in (train, val)
    )

    def fill(arrays: Arrays) -> None:
        with ThreadPoolExecutor() as pool:
            digests = {
                digest for digest in pool.map(_digest, (val.files[i] for i in held)) if digest
            }
            found = pool.map(_digest, (train.files[i] for i in alike))
            copies = [i for i, digest in zip(alike, found, strict=True) if digest in digests]
        arrays["keep"][:] = True
        arrays["keep"][copies] = False

    if not alike:
        return train
    arrays, _ = stored(
        cache_dir, "copies", [train.key, val.key], {"keep": ((len(train),), "bool")}, fill
    )
    keep = np.flatnonzero(arrays["keep"])
    if len(keep) == len(train):
        return train
    if not len(keep):
        raise InputError(
            f"all {len(train):,} training images below {train.root} are copies of validation images; give others"
        )
    log_line(
        f"{len(train) - len(keep)} training images are copies of validation images and are left out"
    )
    return train.part(keep)


def _digest(file: Path) -> bytes | None:
    try:
        return hashlib.blake2b(file.read_bytes()).digest()
    except OSError:
        return None
