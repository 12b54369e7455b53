"""Pictures for people: image grids and bar charts, for the run folder and the loggers."""

import io
import math
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from codegrid.engine.console import best_effort_write
from codegrid.engine.lightning_doors import logged_step


def tile_images(rows: list[Tensor], gap: int = 2, scale: int = 1) -> Tensor:
    """Tile rows of images of one size, each row (n, C, H, W) uint8, into one picture (3, height, width) uint8.

    `gap` is the white space between images in pixels; `scale` is an integer enlargement factor.
    """
    n, _, height, width = rows[0].shape
    sheet = torch.full(
        (3, len(rows) * (height + gap) - gap, n * (width + gap) - gap), 255, dtype=torch.uint8
    )
    for r, row in enumerate(rows):
        for i, image in enumerate(row.cpu()):
            top, left = r * (height + gap), i * (width + gap)
            # A single grey channel is broadcast to all three.
            sheet[:, top : top + height, left : left + width] = image
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def draw_bars(
    counts: Tensor, caption: str, width: int = 768, height: int = 200, top: float | None = None
) -> Tensor:
    """Draw counts (n,) as bars: a (3, 24 + height, width) uint8 picture with the caption on top.

    The logarithmic scale ends at `top`, or at the highest count if `top` is None. Grey lines mark powers of ten, the orange
    line marks the mean, and columns with a count of zero have a red background. If there are more counts than columns, a
    column shows the mean of its counts.
    """
    values = counts.float()
    bar = torch.arange(width + 1) * len(values) // width  # the bar of each column
    columns = (
        F.adaptive_avg_pool1d(values[None], width)[0] if len(values) > width else values[bar[:-1]]
    )
    top = max(float(columns.max()) if top is None else top, 1.0)

    def level(count: Tensor) -> Tensor:
        """Height in pixels, rounded up so that even a count of one is visible."""
        return (count.log1p() / math.log1p(top) * height).ceil().long().clamp(max=height)

    colours = (44, 82, 130), (222, 226, 232), (237, 137, 54), (254, 235, 235)
    ink, line, mean, ground = (torch.tensor(colour, dtype=torch.uint8) for colour in colours)
    chart = torch.full((height, width, 3), 255, dtype=torch.uint8)
    chart[:, columns == 0] = ground
    tens = level(10.0 ** torch.arange(math.floor(math.log10(top)) + 1))
    chart[height - tens] = line
    inside = torch.arange(height)[:, None] >= height - level(columns)
    if width > 3 * len(values):
        inside &= bar[:-1] == bar[1:]  # leaves a gap between bars
    chart[inside] = ink
    chart[height - level(values.mean()).clamp(min=1)] = mean
    label = Image.new("RGB", (width, 24), "white")
    font = ImageFont.load_default(13)
    ImageDraw.Draw(label).text(
        (2, 4), f"{caption} (log scale: grey 1, 10, 100 ...; orange the mean)", (40, 44, 52), font
    )
    return torch.cat([torch.from_numpy(np.array(label)), chart]).permute(2, 0, 1).contiguous()


def encode_png(image: Tensor) -> bytes:
    """A (3, H, W) uint8 picture as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
    return content.getvalue()


def save_picture(sheet: Tensor, path: Path, caption: str = "") -> Path:
    """Write a (3, H, W) uint8 picture as PNG and create its folder if necessary; a caption is the text "Description" in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    if caption:
        texts.add_text("Description", caption)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path, "PNG", pnginfo=texts)
    return path


def show_picture(
    trainer: L.Trainer, sheet: Tensor, folder: Path, name: str, step: int, caption: str = ""
) -> Path:
    """Save a (3, H, W) uint8 picture as folder/name-<step>.png and log it, with its caption, to every logger that takes images."""
    file = folder / f"{name}-{step:06d}.png"
    with best_effort_write(file):
        save_picture(sheet, file, caption)
    step = logged_step(trainer)
    for logger in trainer.loggers:  # uint8, because W&B turns float pictures black
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, sheet.numpy(), step)
        elif hasattr(logger, "log_image"):
            words = {"caption": [caption]} if caption else {}
            logger.log_image(key=name, images=[sheet.permute(1, 2, 0).numpy()], step=step, **words)
    return file
