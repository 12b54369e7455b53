"""From codes to images, and from their pixels to what is shown of them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from codegrid.data.images import to_float
from codegrid.data.pixels import PixelRules
from codegrid.data.shown import pick_shown
from vqgan.tokenizer import Tokenizer


def decode_latents(tokenizer: Tokenizer, latents: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The pictures of z_q (n, dim, h, w) in parts (b, C, H, W) float32, about [-1, 1] but not clamped.

    A part has as many pixels as `batch_size` images of the tokenizer's own size, however large the grid is.
    """
    pixels = batch_size * math.prod(tokenizer.grid)
    at_once = max(1, pixels // math.prod(latents.shape[2:]))
    for part in latents.split(at_once):
        yield tokenizer.decode(part)


def show_pixels(images: Tensor, rules: PixelRules) -> Tensor:
    """Pixels (B, C, H, W) as batches have them -> pictures (B, 3 or 1, H, W) uint8 of the shown channels."""
    if images.dtype == torch.uint8:
        return pick_shown(images, rules.show)
    return rules.to_picture(to_float(images))
