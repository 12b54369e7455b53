"""Folders of images, in class folders or flat."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.endings import ARRAY_SUFFIXES, IMAGE_SUFFIXES, advise_on
from codegrid.data.labelling import Labelling, label_files
from codegrid.data.labels import Classes, order_names
from codegrid.data.loading import count_cores
from codegrid.data.source import FileSource, Source
from codegrid.data.store import Arrays, load_or_fill
from codegrid.data.threads import map_in_threads
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.words import format_word

SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test")


def find_images(root: Path) -> list[Path]:
    """The image files below a folder that version 0.1 read, in the order of their paths (see `list_files`)."""
    return list_files(root, IMAGE_SUFFIXES)[0]


def list_files(root: Path, suffixes: Collection[str]) -> tuple[list[Path], Counter[str]]:
    """All files below a folder with these suffixes, in the order of their paths, and the number of others by their endings.

    Hidden files are left out. Links to folders are followed. Each folder is visited once, so that link cycles end, and links
    are visited after the real folders next to them, so that images keep their real paths. Folders that cannot be listed
    are logged.
    """
    wanted = set(suffixes)
    images: list[Path] = []
    others: Counter[str] = Counter()
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
        for name in files:
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in wanted:
                images.append(Path(folder, name))
            else:
                others[suffix.removeprefix(".")] += 1
    # The order of paths, in half the time.
    return sorted(images, key=lambda file: file.parts), others


def open_class_folders(
    root: Path, classes: Classes = None, suffixes: Collection[str] = IMAGE_SUFFIXES
) -> FileSource:
    """The image files below a folder, labelled by their class folders (the first level below it), or 0 in a flat folder.

    `classes` is data.classes, which decides on the order of the class folders.
    """
    files, left_out = list_files(root, suffixes)
    if not files:
        raise InputError(
            f"{root} holds no image ({', '.join(sorted(suffixes))}); give the folder that does"
            f"{advise_on(left_out)}"
        )
    depth = len(root.parts)
    names = [file.parts[depth] if len(file.parts) > depth + 1 else "" for file in files]
    ordered = order_names(names, classes)
    numbers = {name: number for number, name in enumerate(ordered)}
    source = FileSource(root, files, [numbers[name] for name in names], ordered)
    source.left_out = left_out
    return source


def resolve_folder(root: str | None, setting: str, dataset: str) -> Path:
    """The existing folder that a setting names, with ~ expanded. Raises InputError if there is none."""
    if not root:
        raise InputError(
            f"data={dataset} needs the folder that holds the images; add {setting}=<folder>"
        )
    if not Path(root).expanduser().is_dir():
        raise InputError(f"{setting}={root} is not a folder; give the folder that holds the images")
    return Path(root).expanduser()


class TableDataModule(ImageDataModule):
    """Image files whose labels may stand in a table."""

    place_settings: ClassVar[tuple[str, ...]] = ("labels",)
    label_settings: ClassVar[Sequence[str]] = [
        name for name in Labelling.settings() if name != "val_labels"
    ]

    def read_table(self, *sources: FileSource) -> list[FileSource]:
        """The files of a folder, or of one that trains and one that validates, with the labels and columns of their table, if
        data.labels names one."""
        if self.labelling.labels is None:
            return list(sources)
        labelled = label_files(sources, self.labelling, self.class_setting)
        self.file_column = labelled.file_column
        self.column_names = labelled.column_names
        self.label_summary = labelled.summary
        self._forget_tables(sources[0].root)
        return labelled.sources

    def _forget_tables(self, root: Path) -> None:
        """Don't count tables that lie among the images as files that are left out."""
        counts = Counter(self.left_out)
        for table in {self.labelling.labels, self.labelling.val_labels} - {None}:
            path = Path(str(table)).expanduser().resolve()
            if path.is_relative_to(root.resolve()):
                counts[path.suffix.lower().removeprefix(".")] -= 1
        self.left_out = +counts


class Folder(TableDataModule):
    """The images below `root`, of any format that Pillow reads, in class folders or flat.

    root       the folder
    val_root   folder of the validation images, which may lack classes; None holds out `n_val` images of `root`
    n_val      number of images to hold out
    held_out   which ones: "random", by `split_seed` and their paths below the root, or the "last" in the order of these paths

    Training files with the same bytes as a validation file are left out. The labels are the class folders, or a column of the
    table `labels` (see Labelling).
    """

    place_settings = ("root", "val_root", "val_labels")
    label_settings = Labelling.settings()

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
        self.labelling.check(self.val_root is not None)
        whole = self._open_whole()
        if not self.labelling.label:
            self._refuse_splits(root, whole.classes)
        self.left_out = whole.left_out
        if self.val_root:
            val = open_class_folders(self.val_root, None, self.suffixes)
            if not self.labelling.label:
                val = match_classes(val, whole)
            whole, val = self.read_table(whole, val)
            train = whole
        else:
            [whole] = self.read_table(whole)
            train_rows, val_rows = self.hold_out(whole.names(), n_val, held_out)
            train, val = whole.subset(train_rows), whole.subset(val_rows)
        self.classes = whole.classes
        self.n_val = None if self.val_root else n_val
        distinct = drop_copies(train, val, self.cache_dir)
        if len(distinct) < len(train):
            self.copied_ids = np.setdiff1d(train.image_ids(), distinct.image_ids())
        self._splits = {"train": distinct, "val": val}

    def _open_whole(self) -> FileSource:
        """The image files below the root. Of pictures and arrays side by side the fewer ones are taken for other data, which is
        logged, unless data.suffixes names them."""
        whole = open_class_folders(self.root, self.class_setting, self.suffixes)
        if not self.decides_suffixes:
            return whole
        num_arrays = sum(file.name.lower().endswith(ARRAY_SUFFIXES) for file in whole.files)
        num_pictures = len(whole) - num_arrays
        if not num_arrays or not num_pictures:
            return whole
        takes_arrays = num_arrays > num_pictures
        self.suffixes = [s for s in self.suffixes if (s in ARRAY_SUFFIXES) == takes_arrays]
        few, many = f"{num_arrays:,} arrays (.npy, .npz)", f"{num_pictures:,} pictures"
        if takes_arrays:
            few, many = many, few
        log_line(
            f"{few} beside {many} in {self.root} are left out; data.suffixes names the endings of all images"
        )
        return open_class_folders(self.root, self.class_setting, self.suffixes)

    def _refuse_splits(self, root: str | None, classes: list[str]) -> None:
        """Raise InputError if the class folders are in fact splits."""
        splits = sorted(
            (name for name in classes if name.lower() in SPLIT_FOLDERS),
            key=lambda name: SPLIT_FOLDERS.index(name.lower()),
        )
        if len(splits) > 1:
            raise InputError(
                f"data.root={root} holds the splits {', '.join(splits)}, which would be taken for classes; "
                f"give two of them, {format_word('data.root', self.root / splits[0])} "
                f"{format_word('data.val_root', self.root / splits[1])}"
            )

    def open_source(self, split: str) -> Source:
        return self._splits[split]


def match_classes(val: FileSource, train: FileSource) -> FileSource:
    """Validation files with the numbers that their classes have in training.

    Files in no class folder have no class, -1; if training has no class folders, all are of its one class, 0. Whatever differs
    from training is logged. Raises InputError for a class folder that training lacks, whose name may be a slip.
    """
    flat = train.classes == [""]
    numbers = {"": -1} | {name: number for number, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in numbers]
    missing = [name for name in train.classes if name and name not in val.classes]
    if flat and unknown:
        log_line(f"the class folders of {val.root} don't count, since {train.root} has none")
    elif unknown:
        raise InputError(
            f"{val.root} has class folders that the training images in {train.root} lack: {name_some(unknown)}; "
            "rename them as in training, or take them out"
        )
    elif missing:
        log_line(
            f"{val.root} has images of {len(train.classes) - len(missing)} of the {len(train.classes)} classes in {train.root}, "
            f"none of {name_some(missing)}"
        )
    labels = [0 if flat else numbers[val.classes[label]] for label in val.labels]
    if unlabelled := labels.count(-1):
        log_line(f"{unlabelled:,} images of {val.root} lie in no class folder and have no class")
    return FileSource(val.root, val.files, labels, train.classes, val.stamps)


def name_some(names: Sequence[str], n: int = 5) -> str:
    """The first n names, and how many more there are."""
    more = f" and {len(names) - n:,} more" if len(names) > n else ""
    return f"{', '.join(names[:n])}{more}"


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
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, hashlib.blake2b).digest()
    except OSError:
        return None
