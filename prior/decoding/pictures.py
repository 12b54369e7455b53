"""From codes to pictures."""

import math
from collections.abc import Iterator

from torch import Tensor

from vqgan.tokenizer import Tokenizer


def decode_latents(tokenizer: Tokenizer, latents: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The pictures of z_q (n, dim, h, w) in parts (b, C, H, W) float32, about [-1, 1] but not clamped.

    A part has as many pixels as `batch_size` images of the tokenizer's own size, however large the grid is.
    """
    pixels = batch_size * math.prod(tokenizer.grid)
    at_once = max(1, pixels // math.prod(latents.shape[2:]))
    for part in latents.split(at_once):
        yield tokenizer.decode(part)
