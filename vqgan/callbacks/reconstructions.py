"""Pictures of validation images and their reconstructions."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.pictures import show_picture, tile_images
from codegrid.engine.folder import PICTURES
from codegrid.evaluation.units import describe_shown
from vqgan.module import VQGAN


class Reconstructions(Callback):
    """After each validation: `rows` rows of `n` validation images, each row above its reconstructions and what else the module
    shows of them.

    `file` is the last picture, in the folder `pictures` of the run.
    """

    def __init__(self, n: int = 12, rows: int = 2) -> None:
        self.n, self.rows = n, rows
        self.file: Path | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VQGAN)
        data = trainer.datamodule  # type: ignore[attr-defined]
        is_first = trainer.is_global_zero and not trainer.sanity_checking
        if not is_first or not isinstance(data, ImageDataModule):
            return
        x = data.preprocess(data.take_evenly("val", self.n * self.rows)[0].to(module.device))
        with torch.no_grad():
            versions = module.show_versions(x)
        rows: list[Tensor] = []
        pictures = [data.rules.to_picture(images).split(self.n) for images in versions]
        for group in zip(*pictures, strict=True):
            if len(group[0]) == len(x[: self.n]):  # a short last row would not fit the picture
                rows += group
        folder = Path(trainer.default_root_dir) / PICTURES
        sheet, caption = tile_images(rows, scale=2), describe_shown(data.rules, data.channels)
        name, step = "reconstructions", module.step
        self.file = show_picture(trainer, sheet, folder, name, step, caption)
