"""Codes instead of images: what stage 2 trains on."""

import numpy as np
import torch
from torch import Tensor

from data.loading import BatchDataModule, Samples


class CodeDataModule(BatchDataModule):
    """Batches (indices, label): indices (B, h, w) int64 in [0, K), label (B,) int64."""

    def __init__(self, train: Samples, val: Samples, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, num_workers=0, seed=seed)
        self.codes = {"train": train, "val": val}

    def load(self, split: str) -> Samples:
        return self.codes[split]

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        indices, labels = batch
        return indices.long(), labels


def sequences(samples: Samples) -> Tensor:
    """All codes of a split as raster sequences (n, h*w), int64."""
    return torch.from_numpy(np.asarray(samples.values).reshape(len(samples), -1).astype(np.int64))
