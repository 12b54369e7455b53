"""Pictures of validation images and their reconstructions."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from data.datamodule import ImageDataModule
from data.images import to_uint8
from data.pictures import show_picture, tile_images
from engine.folder import PICTURES
from vqgan.module import VQGAN


class Reconstructions(Callback):
    """After each validation: validation images above, their reconstructions below, in rows of `n`."""

    def __init__(self, n: int = 12, rows: int = 2) -> None:
        self.n, self.rows = n, rows
        self.file: Path | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VQGAN)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (
            trainer.is_global_zero
            and not trainer.sanity_checking
            and isinstance(data, ImageDataModule)
        ):
            x = data.preprocess(data.take_evenly("val", self.n * self.rows)[0].to(module.device))
            with torch.no_grad():
                x_hat = module.tokenizer.decode(module.tokenizer.encode(x).z_q)
            pairs = zip(to_uint8(x).split(self.n), to_uint8(x_hat).split(self.n), strict=True)
            rows = [
                row for real, made in pairs if len(real) == len(x[: self.n]) for row in (real, made)
            ]
            self.file = show_picture(
                trainer,
                tile_images(rows, scale=2),
                Path(trainer.default_root_dir) / PICTURES,
                "reconstructions",
                module.step,
            )
