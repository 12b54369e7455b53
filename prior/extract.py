"""Tokenizer x images -> code cache."""

import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from data.datamodule import ImageDataModule
from data.images import crop_at
from data.samples import ArraySamples
from data.store import Arrays, CacheEntry, flush
from engine.console import progress_bar
from engine.environment import autocast
from engine.errors import InputError
from vqgan.quantizers.base import NO_CODES_MESSAGE
from vqgan.tokenizer import Tokenizer

PIECE = 256  # images that are encoded or not
SAVED = 5.0  # seconds of work that a killed extraction loses at most


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
    """The codes (views * n, h, w) of a split's n images, encoded once and kept under the data's cache folder.

    Views follow each other, each with all images: the middle of each image, then `crops` - 1 crops at random places, and
    with `flip` each of these mirrored after it. With several codebooks the shape ends in their number. The cache is known
    by the tokenizer's weights, the images' content and the views: when one changes the images are encoded anew. A killed
    extraction goes on where it was. The processes of `fabric`, which is launched, share the work.
    """
    if tokenizer.K is None:
        raise InputError(NO_CODES_MESSAGE)
    if crops < 1:
        raise InputError(f"crops={crops} must be at least 1, the middle of the image")
    if crops > 1 and data.side == data.image_size:
        raise InputError(
            f"crops={crops} need room to move, and these images are {data.side} pixels wide, which is all that the model sees; "
            "train the tokenizer with data.crop=random, or use crops=1"
        )
    n = data.size(split)
    entry = code_entry(tokenizer, data, split, n, flip, crops)
    if not _there(entry, fabric):
        with entry.acquire() if fabric.is_global_zero else nullcontext():
            if not _there(entry, fabric):  # nobody made it while we waited
                if fabric.is_global_zero and not _begun(entry):
                    entry.create()
                fabric.barrier()
                arrays = entry.reopen()
                places = np.random.default_rng(data.seed).random((crops - 1, n, 2))
                _encode(
                    tokenizer.to(fabric.device),
                    data,
                    split,
                    flip,
                    places,
                    batch_size,
                    arrays,
                    fabric,
                )
                fabric.barrier()
                if fabric.is_global_zero:
                    entry.publish(arrays, checksummed=("indices", "labels"))
            fabric.barrier()
    found = entry.read()
    assert found is not None
    return ArraySamples(found["indices"], found["labels"])


def code_entry(
    tokenizer: Tokenizer, data: ImageDataModule, split: str, n: int, flip: bool, crops: int
) -> CacheEntry:
    """Where the codes of a split's n images lie, and what they are known by."""
    K, views = tokenizer.K, crops * (1 + flip)
    assert K is not None
    num_codebooks = (tokenizer.num_codebooks,) if tokenizer.num_codebooks > 1 else ()
    key = {
        "tokenizer": tokenizer.fingerprint(),
        "data": data.cache_key(split),
        "image_size": data.image_size,
        "split": split,
        "K": K,
        "grid": list(tokenizer.grid),
        "crops": crops,
        "crop_seed": data.seed if crops > 1 else None,
        "flips": bool(flip),
    }
    spec = {
        "indices": (
            (views * n, *tokenizer.grid, *num_codebooks),
            "uint16" if K <= 2**16 else "uint32",
        ),
        "labels": ((views * n,), "int64"),
        "done": ((-(-n // PIECE),), "bool"),  # which pieces are encoded
    }
    return CacheEntry(data.cache_dir, f"codes-{split}", key, spec)


def _there(entry: CacheEntry, fabric: Fabric) -> bool:
    """Whether the entry is there and sound, as the first process sees it."""
    seen: bool = fabric.broadcast(fabric.is_global_zero and entry.read() is not None)
    return seen


def _begun(entry: CacheEntry) -> bool:
    try:
        entry.reopen()
    except (OSError, ValueError):  # nothing there, or killed while it was laid out
        shutil.rmtree(entry.part, ignore_errors=True)
        return False
    return True


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
    """Fill this process's share of what is not done yet."""
    n = data.size(split)
    missing = np.flatnonzero(~np.asarray(arrays["done"]))
    mine = missing[fabric.global_rank :: fabric.world_size].tolist()
    indices, labels = (
        arrays[name].reshape(-1, n, *arrays[name].shape[1:]) for name in ("indices", "labels")
    )  # by view
    finished: list[int] = []
    saved = time.monotonic()

    def write(piece: int, codes: list[Tensor], told: Tensor) -> None:
        rows = slice(piece * PIECE, piece * PIECE + len(told))
        for view, found in enumerate(codes):
            indices[view, rows], labels[view, rows] = found.cpu().numpy(), told.numpy()
        finished.append(piece)

    def save() -> None:
        flush(arrays["indices"], arrays["labels"])  # first: a piece called done must be on the disk
        arrays["done"][finished] = True
        flush(arrays["done"])
        finished.clear()

    waiting: tuple[int, list[Tensor], Tensor] | None = None
    with progress_bar(
        n, f"codes of {split}", max(0, n - len(missing) * PIECE), fabric.is_global_zero
    ) as bar:
        for piece, (batch, told) in zip(mine, data.iterate_chunks(split, PIECE, mine), strict=True):
            rows = slice(piece * PIECE, piece * PIECE + len(batch))
            x = batch.to(fabric.device, non_blocking=True)
            with autocast(fabric.device):
                codes = [
                    torch.cat([tokenizer.indices(part) for part in seen.split(batch_size)])
                    for seen in views(data, x, places[:, rows], flip)
                ]
            if waiting:  # a GPU works on this batch while the codes of the one before are fetched
                write(*waiting)
            waiting = piece, codes, told
            if time.monotonic() - saved > SAVED:
                save()
                saved = time.monotonic()
            bar.update(len(batch) * fabric.world_size)
        if waiting:
            write(*waiting)
        save()


def views(
    data: ImageDataModule, images: Tensor, places: NDArray[np.float64], flip: bool
) -> Iterator[Tensor]:
    """uint8 images (B, C, side, side) as a model sees them: the middle, a crop at each of `places` (crops, B, 2), which
    are shares of the room, and with `flip` each mirrored."""
    room = data.side - data.image_size
    corners = [
        torch.from_numpy((place * (room + 1)).astype(np.int64)).to(images.device)
        for place in places
    ]
    for seen in (images, *(crop_at(images, corner, data.image_size) for corner in corners)):
        x = data.preprocess(seen)
        yield x
        if flip:
            yield x.flip(3)
