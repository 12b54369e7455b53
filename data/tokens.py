"""Codes instead of images: the data of stage 2, and its export for other programs."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import Tensor

from codegrid.data.loading import BatchDataModule
from codegrid.data.samples import ArraySamples
from codegrid.engine.errors import InputError

EXPORT_FORMATS = ("npz", "safetensors")


class CodeDataModule(BatchDataModule):
    """Batches (indices, label): indices (B, h, w), or (B, h, w, num_codebooks), int64 in [0, K); label (B,) int64, or what else
    a prior is conditioned on: (B, size) float32 or (B, length) int64."""

    group = ""  # conf/stage/prior.yaml has batch_size at its root

    def __init__(self, train: ArraySamples, val: ArraySamples, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, num_workers=0, seed=seed)
        self.codes = {"train": train, "val": val}

    def load_samples(self, split: str) -> ArraySamples:
        return self.codes[split]

    def read_first(self, n: int) -> tuple[Tensor, Tensor]:
        return self.on_after_batch_transfer(super().read_first(n), 0)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        indices, labels = batch
        return indices.long(), labels


def export_codes(samples: ArraySamples, metadata: dict[str, Any], file: Path) -> Path:
    """Write the codes of a split for other programs: arrays `indices` and `labels`, `column_<name>` for each column, and
    `metadata` about them.

    The suffix of the file decides on the format: .npz holds the metadata as arrays, .safetensors as text. The file is
    complete or absent. Raises InputError if it cannot be written.
    """
    arrays = {
        "indices": np.ascontiguousarray(samples.values),
        "labels": np.ascontiguousarray(samples.labels),
    }
    for name, column in samples.columns.items():
        views = len(samples) // max(1, len(column))
        arrays[f"column_{name}"] = np.concatenate([column] * views)
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npz":
            extra: dict[str, Any] = {name: np.asarray(value) for name, value in metadata.items()}
            with part.open("wb") as opened:
                np.savez(opened, **arrays, **extra)  # type: ignore[arg-type]
        else:
            text = {
                name: json.dumps(value, ensure_ascii=False, allow_nan=False)
                if isinstance(value, list)
                else str(value)
                for name, value in metadata.items()
            }
            save_file(arrays, part, metadata=text)
        os.replace(part, file)
    except OSError as error:
        raise InputError(
            f"can't write {file} ({error}); free some space or name another folder with run_dir=..."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return file
