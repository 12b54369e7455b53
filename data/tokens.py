"""Codes instead of images: what stage 2 trains on, and what other programs may be given."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import Tensor

from data.loading import ArraySamples, BatchDataModule
from engine.errors import InputError

FORMATS = ("npz", "safetensors")


class CodeDataModule(BatchDataModule):
    """Batches (indices, label): indices (B, h, w), or (B, h, w, num_codebooks), int64 in [0, K), label (B,) int64."""

    def __init__(self, train: ArraySamples, val: ArraySamples, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, num_workers=0, seed=seed)
        self.codes = {"train": train, "val": val}

    def load(self, split: str) -> ArraySamples:
        return self.codes[split]

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        indices, labels = batch
        return indices.long(), labels


def export(samples: ArraySamples, meta: dict[str, Any], file: Path) -> Path:
    """A split's codes for other programs: arrays `indices` and `labels`, and `meta` about them.

    By the file's ending .npz, in which meta are arrays too, or .safetensors, in which they are its metadata, as text. The
    file is written whole or not at all.
    """
    arrays = {
        "indices": np.ascontiguousarray(samples.values),
        "labels": np.ascontiguousarray(samples.labels),
    }
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npz":
            with part.open("wb") as opened:
                facts: dict[str, Any] = {name: np.asarray(value) for name, value in meta.items()}
                np.savez(opened, **arrays, **facts)  # type: ignore[arg-type]
        else:
            save_file(arrays, part, metadata={name: str(value) for name, value in meta.items()})
        os.replace(part, file)
    except OSError as error:
        raise InputError(
            f"can't write {file} ({error}); free some space or name another folder with run_dir=..."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return file
