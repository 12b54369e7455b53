"""Tokenizer x images -> code cache."""

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.datamodule import ImageDataModule, prepare
from data.loading import Samples
from data.store import Arrays, stored
from vqgan.callbacks.progress import patience
from vqgan.run import autocast
from vqgan.tokenizer import Tokenizer


def extract(tokenizer: Tokenizer, data: ImageDataModule, described: Any, split: str, flip: bool, device: torch.device) -> Samples:
    """The codes (n, h, w) of a split, encoded once and kept; with `flip` those of the mirrored images follow, (2n, h, w).

    `described` is the config of the data. The cache's key is made of it and of the tokenizer's weights: when either
    changes the images are encoded anew.
    """
    assert tokenizer.K is not None
    images = data.split(split)
    sides = 2 if flip else 1
    n = sides * len(images)
    key = {"tokenizer": tokenizer.fingerprint(), "data": described, "split": split, "flip": flip, "K": tokenizer.K}
    dtype = "uint16" if tokenizer.K <= 2**16 else "int32"
    tokenizer = tokenizer.to(device)

    @torch.no_grad()
    def fill(arrays: Arrays) -> None:
        done = 0
        loader = data.once(split)
        with tqdm(total=n, desc=f"codes of {split}", unit=" images", leave=False, mininterval=patience()) as bar:
            for side in range(sides):
                for batch, labels in loader:
                    x = prepare(batch.to(device))
                    with autocast(device):
                        indices = tokenizer.indices(x.flip(3) if side else x)
                    part = slice(done, done + len(batch))
                    arrays["indices"][part] = indices.cpu().numpy().astype(dtype)
                    arrays["labels"][part] = labels.numpy()
                    done += len(batch)
                    bar.update(len(batch))

    spec: dict[str, tuple[tuple[int, ...], Any]] = {
        "indices": ((n, *tokenizer.grid), dtype),
        "labels": ((n,), np.int64),
    }
    arrays = stored(data.cache_dir, f"codes-{split}", key, spec, fill)
    return Samples(arrays["indices"], arrays["labels"])
