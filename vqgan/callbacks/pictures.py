"""Pictures of what a model does, into the run folder and the loggers that take images."""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from data.datamodule import ImageDataModule
from data.images import picture, save_picture, to_uint8
from data.terminal import spared
from vqgan.module import VQGAN


def show(trainer: L.Trainer, sheet: Tensor, folder: Path, name: str, step: int) -> Path:
    """Save a (3, H, W) uint8 picture as folder/name-<step>.png and hand it to every logger that takes images."""
    file = folder / f"{name}-{step:06d}.png"
    with spared(file):
        save_picture(sheet, file)
    step = beside_figures(trainer)
    for logger in trainer.loggers:  # as uint8: of floats W&B makes a black picture
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, sheet.numpy(), step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[sheet.permute(1, 2, 0).numpy()], step=step)
    return file


def beside_figures(trainer: L.Trainer) -> int:
    """The step at which Lightning gives the figures of this validation to the loggers, that of the batch before it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def show_histogram(trainer: L.Trainer, counts: Tensor, name: str) -> None:
    """Hand counts (n,) to every logger that takes histograms, in neighbouring groups where there are more than it takes."""
    import wandb

    step = beside_figures(trainer)
    groups = counts.tensor_split(min(len(counts), wandb.Histogram.MAX_LENGTH))
    heights, edges = torch.stack([group.sum() for group in groups]).numpy(), np.cumsum([0, *map(len, groups)])
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_metrics({name: wandb.Histogram(np_histogram=(heights, edges))}, step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            middles, n = (edges[1:] + edges[:-1]) / 2, heights.sum()
            moments = (heights * middles).sum(), (heights * middles**2).sum()
            logger.experiment.add_histogram_raw(name, 0, len(counts), n, *moments, edges[1:].tolist(), heights.tolist(), step)


class Reconstructions(Callback):
    """After each validation: validation images above, their reconstructions below, in rows of `n`."""

    def __init__(self, folder: Path, n: int = 12, rows: int = 2) -> None:
        self.folder, self.n, self.rows = folder, n, rows
        self.file: Path | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VQGAN)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and not trainer.sanity_checking and isinstance(data, ImageDataModule):
            x = data.view(data.some("val", self.n * self.rows)[0].to(module.device))
            with torch.no_grad():
                x_hat = module.tokenizer.decode(module.tokenizer.encode(x).z_q)
            pairs = zip(to_uint8(x).split(self.n), to_uint8(x_hat).split(self.n), strict=True)
            rows = [row for real, made in pairs if len(real) == len(x[: self.n]) for row in (real, made)]
            self.file = show(trainer, picture(rows, scale=2), self.folder, "reconstructions", module.step)
