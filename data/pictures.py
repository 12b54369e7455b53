"""Pictures of what a model does, for the run folder and the loggers."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from data.images import save_picture
from engine.console import best_effort_write
from engine.lightning_doors import logged_step


def show_picture(trainer: L.Trainer, sheet: Tensor, folder: Path, name: str, step: int) -> Path:
    """Save a (3, H, W) uint8 picture as folder/name-<step>.png and hand it to every logger that takes images."""
    file = folder / f"{name}-{step:06d}.png"
    with best_effort_write(file):
        save_picture(sheet, file)
    step = logged_step(trainer)
    for logger in trainer.loggers:  # as uint8: of floats W&B makes a black picture
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, sheet.numpy(), step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[sheet.permute(1, 2, 0).numpy()], step=step)
    return file
