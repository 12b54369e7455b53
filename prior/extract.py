"""Encode images into codes, cached on disk."""

import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.datamodule import LABELS, ImageDataModule
from codegrid.data.images import crop_at
from codegrid.data.samples import ArraySamples
from codegrid.data.store import Arrays, CacheEntry, flush
from codegrid.engine.console import progress_bar
from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast
from codegrid.engine.sizes import to_setting, write_size
from vqgan.quantizers.base import NO_CODES_MESSAGE
from vqgan.tokenizer import Tokenizer

PIECE = 256  # images per unit of work, which is either done or not
SAVE_EVERY = 5.0  # seconds; a killed extraction loses at most that much work


def check_crops(data: ImageDataModule, crops: int) -> None:
    """Raise InputError if images can't have this many crops."""
    if crops < 1:
        raise InputError(f"crops={crops} must be at least 1, the middle of the image")
    if crops > 1 and data.stored_size == data.image_size:
        raise InputError(
            f"crops={crops} need room to move, and these images are {write_size(data.stored_size)} pixels a side, all that the "
            "model sees; train the tokenizer with data.crop=random, or use crops=1"
        )


def extract(
    tokenizer: Tokenizer,
    data: ImageDataModule,
    split: str,
    flip: bool = False,
    crops: int = 1,
    batch_size: int = 64,
    *,
    fabric: Fabric,
) -> ArraySamples:
    """The codes (views * n, *code_shape) of a split's n images, encoded once and then cached on disk.

    Views follow each other, each with all images: the middle of each image, then `crops` - 1 crops at random places, and,
    with `flip`, after each of these its mirror image. The cache key has the tokenizer's weights, the images' content and the
    views: if any of them changes, the images are encoded again. Labels and columns of a table are those that it has now. A
    killed extraction resumes where it was. The processes of `fabric`, which must be launched, share the work.
    """
    if tokenizer.K is None:
        raise InputError(NO_CODES_MESSAGE)
    check_crops(data, crops)
    n = data.size(split)
    entry = code_entry(tokenizer, data, split, n, flip, crops)
    if not _is_complete(entry, fabric):
        with entry.acquire() if fabric.is_global_zero else nullcontext():
            if not _is_complete(entry, fabric):  # no other run has filled it meanwhile
                if fabric.is_global_zero and not _is_resumable(entry):
                    entry.create()
                fabric.barrier()
                arrays = entry.reopen()
                places = np.random.default_rng(data.seed).random((crops - 1, n, 2))
                tokenizer = tokenizer.to(fabric.device)
                _encode(tokenizer, data, split, flip, places, batch_size, arrays, fabric)
                fabric.barrier()
                if fabric.is_global_zero:
                    entry.publish(arrays, checksummed=("indices", "labels"))
            fabric.barrier()
    cached = entry.read()
    assert cached is not None
    labels = read_table_labels(data, split)
    samples = ArraySamples(
        cached["indices"],
        cached["labels"] if labels is None else np.tile(labels, len(cached["labels"]) // n),
    )
    if data.source(split).columns:
        samples.columns = data.columns(split)
    return samples


def read_table_labels(data: ImageDataModule, split: str) -> NDArray[np.int64] | None:
    """The labels (n,) that a table beside the images has; None if the labels are part of the images.

    A corrected table is no reason to encode the images again, so these are not taken from a cache.
    """
    source = data.source(split)
    if source.label_key is None or source.labels is None:
        return None
    labels, rows = np.asarray(source.labels, np.int64), data.samples(split).rows
    return labels if rows is None else labels[rows]


def name_numbers(data: ImageDataModule) -> dict[str, list[str]]:
    """What numbers stand for in exported codes: `classes` for labels, `names_<column>` for columns of text, if they have names."""
    names = {f"names_{column}": list(texts) for column, texts in data.column_names.items()}
    return {**({"classes": list(data.classes)} if data.classes else {}), **names}


def code_entry(
    tokenizer: Tokenizer, data: ImageDataModule, split: str, n: int, flip: bool, crops: int
) -> CacheEntry:
    """The cache entry of a split's n images: its place, key, and arrays."""
    K, views = tokenizer.K, crops * (1 + flip)
    assert K is not None
    key = {
        "tokenizer": tokenizer.fingerprint(),
        "data": {name: value for name, value in data.cache_key(split).items() if name != LABELS},
        "image_size": to_setting(data.image_size),
        "split": split,
        "K": K,
        "grid": list(tokenizer.grid),
        "crops": crops,
        "crop_seed": data.seed if crops > 1 else None,
        "flips": bool(flip),
    }
    codes_shape = (views * n, *tokenizer.code_shape)
    spec = {
        "indices": (codes_shape, "uint16" if K <= 2**16 else "uint32"),
        "labels": ((views * n,), "int64"),
        "done": ((-(-n // PIECE),), "bool"),  # which pieces are encoded
    }
    return CacheEntry(data.cache_dir, f"codes-{split}", key, spec)


def _is_complete(entry: CacheEntry, fabric: Fabric) -> bool:
    """Whether the entry exists and is not damaged, as the first process sees it."""
    complete: bool = fabric.broadcast(fabric.is_global_zero and entry.read() is not None)
    return complete


def _is_resumable(entry: CacheEntry) -> bool:
    """Whether a killed extraction has left usable arrays; removes what is not usable."""
    try:
        entry.reopen()
    except (OSError, ValueError):  # nothing there, or killed while the arrays were created
        shutil.rmtree(entry.part, ignore_errors=True)
        return False
    return True


class PieceWriter:
    """Writes the codes of pieces of n images into the arrays of a cache entry."""

    def __init__(self, arrays: Arrays, n: int) -> None:
        self.arrays = arrays
        self.indices, self.labels = (
            arrays[name].reshape(-1, n, *arrays[name].shape[1:]) for name in ("indices", "labels")
        )  # (views, n, ...)
        self.unsaved: list[int] = []  # pieces that are written but not marked as done
        self.last_save = time.monotonic()

    def write(self, piece: int, codes: list[Tensor], labels: Tensor) -> None:
        """Write a piece's codes (b, ...), one tensor per view, and labels (b,); save if the last save is some time ago."""
        rows = slice(piece * PIECE, piece * PIECE + len(labels))
        for view, indices in enumerate(codes):
            self.indices[view, rows] = indices.cpu().numpy()
            self.labels[view, rows] = labels.numpy()
        self.unsaved.append(piece)
        if time.monotonic() - self.last_save > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Flush to the disk what is written, and only then mark its pieces as done."""
        flush(self.arrays["indices"], self.arrays["labels"])
        self.arrays["done"][self.unsaved] = True
        flush(self.arrays["done"])
        self.unsaved.clear()
        self.last_save = time.monotonic()


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    data: ImageDataModule,
    split: str,
    flip: bool,
    places: NDArray[np.float64],
    batch_size: int,
    arrays: Arrays,
    fabric: Fabric,
) -> None:
    """Encode this process's share of the pieces that are not done."""
    n = data.size(split)
    missing = np.flatnonzero(~np.asarray(arrays["done"]))
    share = missing[fabric.global_rank :: fabric.world_size].tolist()
    writer = PieceWriter(arrays, n)
    waiting: tuple[int, list[Tensor], Tensor] | None = None
    done = max(0, n - len(missing) * PIECE)
    with progress_bar(n, f"codes of {split}", done, fabric.is_global_zero) as bar:
        for piece, (images, labels) in zip(
            share, data.iterate_chunks(split, PIECE, share), strict=True
        ):
            rows = slice(piece * PIECE, piece * PIECE + len(images))
            x = images.to(fabric.device, non_blocking=True)
            with autocast(fabric.device):
                codes = [
                    torch.cat([tokenizer.indices(part) for part in view.split(batch_size)])
                    for view in views(data, x, places[:, rows], flip)
                ]
            if waiting:  # a GPU encodes this piece while the codes of the one before are fetched
                writer.write(*waiting)
            waiting = piece, codes, labels
            bar.update(len(images) * fabric.world_size)
        if waiting:
            writer.write(*waiting)
        writer.save()


def views(
    data: ImageDataModule, images: Tensor, places: NDArray[np.float64], flip: bool
) -> Iterator[Tensor]:
    """Views of uint8 images (B, C, *stored_size), as a model sees them.

    The middle, then a crop at each of the `places` (crops, B, 2), in shares of the room to move; with `flip`, each is
    followed by its mirror image.
    """
    rooms = np.subtract(data.stored_size, data.image_size)
    corners = [
        torch.from_numpy((place * (rooms + 1)).astype(np.int64)).to(images.device)
        for place in places
    ]
    for cropped in (images, *(crop_at(images, corner, data.image_size) for corner in corners)):
        x = data.preprocess(cropped)
        yield x
        if flip:
            yield x.flip(3)
