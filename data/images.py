"""[-1, 1] <-> uint8, and picture grids: the one place that knows the range."""

from pathlib import Path

import torch
from PIL import Image
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
    sheet = torch.full((3, len(rows) * (height + gap) - gap, n * (width + gap) - gap), 255, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for i, image in enumerate(row.cpu()):
            top, left = r * (height + gap), i * (width + gap)
            sheet[:, top : top + height, left : left + width] = image  # one grey channel spreads over three
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def save_picture(sheet: Tensor, path: Path) -> Path:
    """Write a (3, H, W) uint8 picture as PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)
    return path
