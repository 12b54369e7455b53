"""What every image dataset shares: uint8 arrays in, augmented float batches on the model's device out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from data.images import to_float
from data.loading import BatchDataModule, Samples
from data.store import Arrays, stored


class ImageDataModule(BatchDataModule):
    """Batches (x, label): x (B, channels, image_size, image_size) float32 in [-1, 1], channels last; label (B,) int64."""

    def __init__(
        self, image_size: int, channels: int, batch_size: int, flip: bool, num_workers: int, seed: int, cache_dir: str
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if image_size < 1:
            raise InputError(f"data.image_size={image_size} must be at least 1 pixel")
        if channels not in (1, 3):
            raise InputError(f"data.channels={channels} must be 1 (grey) or 3 (RGB)")
        self.title = type(self).__name__.lower()  # what a run on these images is called
        self.image_size, self.channels, self.flip, self.cache_dir = image_size, channels, flip, cache_dir

    def cached(self, name: str, key: dict[str, Any], n: int, fill: Callable[[Arrays], None]) -> Samples:
        """n images and labels, from the cache or by `fill`."""
        shape = (n, self.channels, self.image_size, self.image_size)
        arrays = stored(self.cache_dir, name, key, {"images": (shape, "uint8"), "labels": ((n,), "int64")}, fill)
        return Samples(arrays["images"], arrays["labels"])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return self.augment(images) if training else prepare(images), labels

    def augment(self, images: Tensor) -> Tensor:
        """uint8 -> float, and with `flip` each image mirrored with probability one half, on the batch's device."""
        x = prepare(images)
        if not self.flip:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(3), x)


def prepare(images: Tensor) -> Tensor:
    """uint8 images as a model takes them: float in [-1, 1], channels last."""
    return to_float(images).contiguous(memory_format=torch.channels_last)
