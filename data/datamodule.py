"""What every image dataset shares: any source of images in, batches on the model's device out, and their augmentation."""

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data.decode import DECODE_VERSION, Unreadable
from data.images import to_float
from data.loading import ArraySamples, BatchDataModule, count_cores
from data.source import Source
from data.store import Arrays, fingerprint, stored
from engine.console import log_line, progress_bar
from engine.errors import InputError

READ_CHUNK = 256  # images that a thread reads before it takes the next


class ImageDataModule(BatchDataModule):
    """Batches (images, label), label (B,) int64, -1 where an image has none.

    Validation images are (B, channels, image_size, image_size) float32 in [-1, 1], channels last. Training images are uint8
    (B, channels, side, side); the training step passes them to `augment`, which gives the same form.

    image_size    pixels a side of what the model sees
    channels      3 RGB, 1 grey; images of the other kind are converted
    crop          "centre": the middle of the image; "random": in training a new place for each image each time
    resize        the side that an image's middle is scaled to before the crop; by default image_size for the centre and
                  9/8 of it for random crops
    flip          mirror left and right at random in training
    cache         decoded images as uint8: "disk", a memory map under `cache_dir`; "ram"; or "none", decoded each time
    on_error      what a broken image does: "stop" or "skip", which leaves it out and says so
    num_workers   processes that read; by default 0 where images are kept, else one a core, up to 8
    """

    classes: list[str] = []  # the names of the labels, in their order
    title = ""  # what a run on these images is called; where nothing else is said, the class's name in small letters

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "centre",
        resize: int | None = None,
        flip: bool = True,
        cache: str = "disk",
        on_error: str = "stop",
        batch_size: int = 32,
        num_workers: int | None = None,
        seed: int = 0,
        cache_dir: str = "cache",
    ) -> None:
        if num_workers is None:
            num_workers = 0 if cache != "none" else min(8, count_cores())
        super().__init__(batch_size, num_workers, seed)
        if not isinstance(image_size, int) or image_size < 1:
            raise InputError(
                f"data.image_size={image_size} must be at least 1 pixel, a whole number"
            )
        if resize is not None and not isinstance(resize, int):
            raise InputError(f"data.resize={resize} must be a whole number of pixels")
        if channels not in (1, 3):
            raise InputError(f"data.channels={channels} must be 1 (grey) or 3 (RGB)")
        for name, value, choices in (
            ("crop", crop, ("centre", "random")),
            ("cache", cache, ("none", "ram", "disk")),
            ("on_error", on_error, ("stop", "skip")),
        ):
            if value not in choices:
                raise InputError(f"data.{name}={value} must be one of {', '.join(choices)}")
        self.side = resize or (image_size if crop == "centre" else round(image_size * 9 / 8))
        if self.side < image_size:
            raise InputError(
                f"data.resize={resize} must be at least data.image_size={image_size}, which is cut out of it"
            )
        self.title = self.title or type(self).__name__.lower()
        self.image_size, self.channels, self.crop, self.flip = image_size, channels, crop, flip
        self.cache, self.on_error, self.cache_dir = cache, on_error, cache_dir
        self._sources: dict[str, Source] = {}

    @abstractmethod
    def open(self, split: str) -> Source:
        """The images of "train" or "val"."""

    def source(self, split: str) -> Source:
        """The images of "train" or "val", opened once."""
        if split not in self._sources:
            self._sources[split] = self.open(split)
        return self._sources[split]

    def key(self, split: str) -> dict[str, Any]:
        """What the uint8 images of a split depend on, as JSON can write it."""
        return {
            "source": self.source(split).key,
            "side": self.side,
            "channels": self.channels,
            "decode": DECODE_VERSION,
        }

    def facts(self) -> dict[str, Any]:
        """What a run's record says of its images: their name, how many there are, and a hash of what they depend on."""
        sizes = {split: self.size(split) for split in ("train", "val")}
        return {
            "title": self.title,
            **sizes,
            "hash": fingerprint([self.key(split) for split in sizes]),
        }

    def load(self, split: str) -> "ArraySamples | Live":
        source = self.source(split)
        if self.cache == "none" and not source.checked:
            return Live(source, None, self.side, self.channels, self.on_error == "stop")
        n, shape = len(source), (self.channels, self.side, self.side)
        spec: dict[str, tuple[tuple[int, ...], str]] = {
            "labels": ((n,), "int64"),
            "good": ((n,), "bool"),
        }
        if self.cache != "none":
            spec["images"] = ((n, *shape), "uint8")

        def fill(arrays: Arrays) -> dict[str, str]:
            return self._fill(source, arrays, f"{self.title} {split}")

        if self.cache == "ram":
            arrays: Arrays = {name: np.empty(of, dtype) for name, (of, dtype) in spec.items()}
            faults = fill(arrays)
        else:
            arrays, faults = stored(
                self.cache_dir, f"{self.title}-{split}", self.key(split), spec, fill
            )
        rows = self._sound(arrays["good"], faults, split)
        if self.cache == "none":
            return Live(source, rows, self.side, self.channels)
        samples = ArraySamples(arrays["images"], arrays["labels"], rows)
        samples.shards = (
            source.shards if rows is None else None
        )  # a cache changes nothing, the order neither
        return samples

    def _fill(self, source: Source, arrays: Arrays, what: str) -> dict[str, str]:
        """Read all images, into `arrays` where they are kept; what is wrong with those that can't be read, by name."""
        found: dict[str, str] = {}

        def some(part: range) -> dict[str, str]:
            images, labels, faults = source.read(part, self.side, self.channels)
            here = slice(part.start, part.stop)
            arrays["labels"][here], arrays["good"][here] = (
                labels,
                [place not in faults for place in range(len(part))],
            )
            if "images" in arrays:
                arrays["images"][here] = images
            return {source.name(part[place]): reason for place, reason in faults.items()}

        parts = [
            range(at, min(at + READ_CHUNK, len(source))) for at in range(0, len(source), READ_CHUNK)
        ]
        pool = ThreadPoolExecutor(count_cores() if source.parallel else 1)
        try:
            with progress_bar(len(source), f"reading {what}") as bar:
                for part, faults in zip(parts, pool.map(some, parts), strict=True):
                    found |= faults
                    bar.update(len(part))
                    if found and self.on_error == "stop":
                        _stop(found)
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _sound(
        self, good: NDArray[np.bool_], faults: dict[str, str], split: str
    ) -> NDArray[np.int64] | None:
        """The rows of the images that could be read, None for all; says which are left out, or stops."""
        if not faults:
            return None
        if self.on_error == "stop":
            _stop(faults)
        if not good.any():
            raise InputError(f"none of the {len(good)} {split} images of {self.title} can be read")
        named = [f"{name} ({reason})" for name, reason in faults.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        log_line(
            f"{len(named)} of {len(good):,} {split} images can't be read and are left out: {', '.join(named[:5])}{more}"
        )
        return np.flatnonzero(good)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Validation images as a model sees them; training images stay uint8, for the training step to augment."""
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return images if training else self.view(images), labels

    def augment(self, images: Tensor) -> Tensor:
        """uint8 -> float, with a random crop and each image mirrored with probability one half, on the batch's device."""
        room = self.side - self.image_size
        if self.crop == "random" and room:
            images = crop_at(
                images,
                torch.randint(room + 1, (len(images), 2), device=images.device),
                self.image_size,
            )
        x = self.view(images)
        if not self.flip:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(3), x)

    def view(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, side, side), or those already cut, as a model sees them: the middle, float in [-1, 1]."""
        at = (images.shape[-1] - self.image_size) // 2
        return prepare(images[..., at : at + self.image_size, at : at + self.image_size])


class Live(Dataset[tuple[Tensor, Tensor]]):
    """A source's images, of `rows` only where some are given, decoded when they are asked for.

    One that breaks after all were checked, or in a source too large for that, is replaced by another of its batch, or
    else by one of the `SPARE` that follow it; with `stop` it ends the run.
    """

    SPARE = 64  # if so many in a row can't be read, the disk is gone

    def __init__(
        self,
        source: Source,
        rows: NDArray[np.int64] | None,
        side: int,
        channels: int,
        stop: bool = False,
    ) -> None:
        self.source, self.rows, self.side, self.channels, self.stop = (
            source,
            rows,
            side,
            channels,
            stop,
        )
        self.shards = source.shards if rows is None else None
        self._said: set[int] = set()

    def __len__(self) -> int:
        return len(self.source if self.rows is None else self.rows)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = list(indices) if self.rows is None else self.rows[indices].tolist()
        images, labels, faults = self.source.read(chosen, self.side, self.channels)
        good = [
            (images[place], labels[place]) for place in range(len(chosen)) if place not in faults
        ]
        for n, (place, reason) in enumerate(faults.items()):
            name = self.source.name(chosen[place])
            if self.stop:
                _stop({name: reason})
            if chosen[place] not in self._said:
                self._said.add(chosen[place])
                log_line(f"{name} can't be read ({reason}); another image takes its place")
            good = good or [self._following(chosen[place], name, reason)]
            images[place], labels[place] = good[n % len(good)]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _following(self, index: int, name: str, reason: str) -> tuple[NDArray[np.uint8], int]:
        """The first of the next images that can be read."""
        for other in range(index + 1, index + 1 + self.SPARE):
            with suppress(Unreadable):
                return self.source.one(other % len(self.source), self.side, self.channels)
        raise InputError(
            f"{name} can't be read ({reason}), nor the {self.SPARE} after it; is the disk still there?"
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


def _stop(faults: dict[str, str]) -> None:
    name, reason = next(iter(faults.items()))
    raise InputError(
        f"{name} can't be read as an image ({reason}); repair it or take it out, or leave out all such with data.on_error=skip"
    )


def crop_at(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """The square of `size` pixels of each image (B, C, H, W) whose upper left corner (row, column) is in `corners` (B, 2)."""
    span = torch.arange(size, device=images.device)
    rows, columns = corners[:, :1] + span, corners[:, 1:] + span  # (B, size) each
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def prepare(images: Tensor) -> Tensor:
    """uint8 images as a model takes them: float in [-1, 1], channels last."""
    return to_float(images).contiguous(memory_format=torch.channels_last)
