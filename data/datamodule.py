"""What every image dataset shares: sources of images in, batches on the model's device out, and their augmentation."""

from abc import abstractmethod
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.decode import DECODE_VERSION
from data.identity import check_same_images, identify_images, save_image_ids
from data.images import crop_at, to_model_input
from data.loading import BatchDataModule, count_cores
from data.samples import ArraySamples, LiveSamples, raise_unreadable
from data.source import Source
from data.store import Arrays, fingerprint, load_or_fill
from data.threads import map_in_threads
from engine.console import log_line, progress_bar
from engine.errors import InputError

READ_CHUNK = 256  # images that a thread reads at a time


class ImageDataModule(BatchDataModule):
    """Batches (images, label), label (B,) int64, -1 for images without a label.

    Validation images are (B, channels, image_size, image_size) float32 in [-1, 1], channels last. Training images are uint8
    (B, channels, side, side); the training step passes them to `augment`, which returns the same form.

    A dataset is a subclass with `open_source`. It passes the settings below on as keywords; conf/images/default.yaml
    holds their defaults.

    image_size    pixels a side of what the model sees
    channels      3 for RGB, 1 for grey; images of the other kind are converted
    crop          "centre": the middle of the image; "random": in training a new position for each image each time
    resize        side in pixels to which the middle square of an image is scaled before the crop; None stands for
                  image_size with centre crops and 9/8 of it with random crops
    flip          mirror images horizontally with probability 1/2 in training
    cache         where decoded uint8 images are cached: "disk", a memory map below `cache_dir`; "ram"; or "none", which
                  decodes them on each access
    on_error      what to do at an unreadable image: "stop", or "skip", which leaves it out and logs its name
    batch_size    images per step and device
    num_workers   processes that read; None stands for 0 if images are cached, else one per core, at most 8
    reader_timeout   seconds without a new batch, or chunk of the cache, after which the run ends; 0 for no limit
    seed          decides the order of training batches and which images are held out
    cache_dir     folder of the cache

    Raises InputError for settings that cannot work.
    """

    classes: list[str] = []  # the class names, in the order of the labels
    # Settings that say where the images are or how they are read, not which they are; subclasses add theirs.
    place_settings: ClassVar[tuple[str, ...]] = (
        "cache",
        "cache_dir",
        "num_workers",
        "on_error",
        "reader_timeout",
    )
    title = ""  # names the run folder and the cache; defaults to the class name in lower case

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        crop: str,
        resize: int | None,
        flip: bool,
        cache: str,
        on_error: str,
        batch_size: int,
        num_workers: int | None,
        reader_timeout: float,
        seed: int,
        cache_dir: str,
    ) -> None:
        if num_workers is None:
            num_workers = 0 if cache != "none" else min(8, count_cores())
        super().__init__(batch_size, num_workers, seed, reader_timeout)
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
        self.image_size = image_size
        self.channels = channels
        self.crop = crop
        self.flip = flip
        self.cache = cache
        self.on_error = on_error
        self.cache_dir = cache_dir
        self._sources: dict[str, Source] = {}

    @abstractmethod
    def open_source(self, split: str) -> Source:
        """The images of "train" or "val"."""

    def source(self, split: str) -> Source:
        """The images of "train" or "val", opened on first use."""
        if split not in self._sources:
            self._sources[split] = self.open_source(split)
        return self._sources[split]

    def cache_key(self, split: str) -> dict[str, Any]:
        """Everything that the uint8 images of a split depend on, in types that JSON can write."""
        return {
            "source": self.source(split).key,
            "side": self.side,
            "channels": self.channels,
            "decode": DECODE_VERSION,
        }

    def describe(self) -> dict[str, Any]:
        """What the record of a run says about its images: their title, the size of each split, and hashes of the images,
        which are the same wherever they lie."""
        sizes = {split: self.size(split) for split in ("train", "val")}
        images = identify_images(self)
        return {"title": self.title, **sizes, "hash": fingerprint(images), "images": images}

    def check_recorded(self, folder: Path | None) -> None:
        """Raise InputError if these are not the images that the run in a folder was trained on; print smaller differences.

        None is a new run, which has no others.
        """
        check_same_images(self, folder, resumes=True)

    def record_images(self, folder: Path) -> None:
        """List the images in a run folder, for later commands to compare theirs with."""
        save_image_ids(self, folder)

    def load_samples(self, split: str) -> ArraySamples | LiveSamples:
        source = self.source(split)
        if self.cache == "none" and not source.checked_up_front:
            return LiveSamples(source, None, self.side, self.channels, self.on_error == "stop")
        arrays, faults = self._read_or_load(source, split)
        rows = self._select_readable(arrays["good"], faults, split)
        if self.cache == "none":
            return LiveSamples(source, rows, self.side, self.channels)
        samples = ArraySamples(arrays["images"], arrays["labels"], rows)
        # Cached images need no order by shards, but caching must not change the order of training.
        samples.shard_sizes = source.shard_sizes if rows is None else None
        return samples

    def _read_or_load(self, source: Source, split: str) -> tuple[Arrays, dict[str, str]]:
        """Labels, a mask of the readable images and, if they are cached, the images; and the faults, name -> reason."""
        n = len(source)
        spec: dict[str, tuple[tuple[int, ...], str]] = {
            "labels": ((n,), "int64"),
            "good": ((n,), "bool"),
        }
        if self.cache != "none":
            spec["images"] = ((n, self.channels, self.side, self.side), "uint8")

        def fill(arrays: Arrays) -> dict[str, str]:
            return self._read_all(source, arrays, f"{self.title} {split}")

        if self.cache == "ram":
            arrays: Arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in spec.items()}
            return arrays, fill(arrays)
        name = f"{self.title}-{split}"
        return load_or_fill(self.cache_dir, name, self.cache_key(split), spec, fill)

    def _read_all(self, source: Source, arrays: Arrays, what: str) -> dict[str, str]:
        """Read all images once and write them into `arrays`; returns the faults of unreadable images, name -> reason."""
        all_faults: dict[str, str] = {}

        def read_chunk(chunk: range) -> dict[str, str]:
            images, labels, faults = source.read_batch(chunk, self.side, self.channels)
            rows = slice(chunk.start, chunk.stop)
            arrays["labels"][rows] = labels
            arrays["good"][rows] = [place not in faults for place in range(len(chunk))]
            if "images" in arrays:
                arrays["images"][rows] = images
            return {source.image_name(chunk[place]): reason for place, reason in faults.items()}

        n = len(source)
        chunks = [range(start, min(start + READ_CHUNK, n)) for start in range(0, n, READ_CHUNK)]
        num_threads = count_cores() if source.use_threads else 1
        results = map_in_threads(read_chunk, chunks, num_threads, self.patience)
        with closing(results), progress_bar(n, f"reading {what}") as bar:
            for chunk, faults in zip(chunks, results, strict=True):
                all_faults |= faults
                bar.update(len(chunk))
                if all_faults and self.on_error == "stop":
                    raise_unreadable(all_faults)
        return all_faults

    def _select_readable(
        self, good: NDArray[np.bool_], faults: dict[str, str], split: str
    ) -> NDArray[np.int64] | None:
        """The rows of the readable images, None if all are readable. Logs which are left out, or raises InputError."""
        if not faults:
            return None
        if self.on_error == "stop":
            raise_unreadable(faults)
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
        return images if training else self.preprocess(images), labels

    def augment(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, side, side) -> model input with random crops and flips, on the device of the images."""
        room = self.side - self.image_size
        if self.crop == "random" and room:
            corners = torch.randint(room + 1, (len(images), 2), device=images.device)
            images = crop_at(images, corners, self.image_size)
        x = self.preprocess(images)
        if not self.flip:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(3), x)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, s, s), s >= image_size -> model input: their middle, float in [-1, 1], channels last."""
        start = (images.shape[-1] - self.image_size) // 2
        stop = start + self.image_size
        return to_model_input(images[..., start:stop, start:stop])
