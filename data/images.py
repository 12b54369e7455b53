"""[-1, 1] <-> uint8, and picture grids: the one place that knows the range."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 0..255, clamped and rounded: what a viewer, a metric and a file get to see."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def picture(rows: list[Tensor], gap: int = 2, scale: int = 1) -> Tensor:
    """Rows of equally large images, each (n, C, H, W) uint8, into one (3, height, width) uint8 picture.

    `gap` is the white space between images and `scale` the enlargement by whole pixels.
    """
    n, _, height, width = rows[0].shape
    sheet = torch.full(
        (3, len(rows) * (height + gap) - gap, n * (width + gap) - gap), 255, dtype=torch.uint8
    )
    for r, row in enumerate(rows):
        for i, image in enumerate(row.cpu()):
            top, left = r * (height + gap), i * (width + gap)
            sheet[:, top : top + height, left : left + width] = (
                image  # one grey channel spreads over three
            )
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def bars(
    counts: Tensor, caption: str, width: int = 768, height: int = 200, top: float | None = None
) -> Tensor:
    """Counts (n,) as bars in a (3, height + a caption's, width) uint8 picture, on a logarithmic scale up to `top`, or to the
    highest.

    Grey lines are powers of ten, the orange one is the mean, and where nothing is counted the ground is red. Where there are
    more counts than columns, a column is the mean of those that fall on it.
    """
    values = counts.float()
    bar = torch.arange(width + 1) * len(values) // width  # of each column
    columns = (
        F.adaptive_avg_pool1d(values[None], width)[0] if len(values) > width else values[bar[:-1]]
    )
    top = max(float(columns.max()) if top is None else top, 1.0)

    def level(count: Tensor) -> Tensor:
        return (
            (count.log1p() / math.log1p(top) * height).ceil().long().clamp(max=height)
        )  # whatever was counted is seen

    colours = (44, 82, 130), (222, 226, 232), (237, 137, 54), (254, 235, 235)
    ink, line, mean, ground = (torch.tensor(colour, dtype=torch.uint8) for colour in colours)
    chart = torch.full((height, width, 3), 255, dtype=torch.uint8)
    chart[:, columns == 0] = ground
    tens = level(10.0 ** torch.arange(math.floor(math.log10(top)) + 1))
    chart[height - tens] = line
    inside = torch.arange(height)[:, None] >= height - level(columns)
    if width > 3 * len(values):
        inside &= bar[:-1] == bar[1:]  # a gap between bars
    chart[inside] = ink
    chart[height - level(values.mean()).clamp(min=1)] = mean
    label = Image.new("RGB", (width, 24), "white")
    font = ImageFont.load_default(13)
    ImageDraw.Draw(label).text(
        (2, 4), f"{caption} (log scale: grey 1, 10, 100 ...; orange the mean)", (40, 44, 52), font
    )
    return torch.cat([torch.from_numpy(np.array(label)), chart]).permute(2, 0, 1).contiguous()


def save_picture(sheet: Tensor, path: Path) -> Path:
    """Write a (3, H, W) uint8 picture as PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)
    return path
