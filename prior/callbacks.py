"""What a prior shows while it learns."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from data.images import picture, to_uint8
from prior.drawing import sample
from prior.module import Prior
from prior.sampling import Sampler
from vqgan.callbacks.pictures import show
from vqgan.tokenizer import Tokenizer


class Samples(Callback):
    """After each validation: samples, decoded, `rows` of `n`; the same random numbers every time."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, n: int = 12, rows: int = 3) -> None:
        self.folder, self.tokenizer, self.n, self.rows = folder, tokenizer, n, rows
        self.file: Path | None = None

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Prior)
        if trainer.is_global_zero and not trainer.sanity_checking:
            n, classes = self.n * self.rows, module.model.classes
            codes = sample(module.model, Sampler(), n, seed=0, labels=torch.arange(n) % classes if classes else None)
            images = to_uint8(self.tokenizer.to(module.device).decode_indices(codes))
            self.file = show(trainer, picture(list(images.split(self.n)), scale=2), self.folder, "samples", module.step)
