"""Pixels <-> the float images of a model. This is the only place that knows the range [-1, 1].

Pixels of 8 bits are uint8. Those of 16 bits are int32 in tensors, since torch lacks most operations for uint16, and uint16
in arrays and files.
"""

import torch
from torch import Tensor

from codegrid.engine.precision import choose_memory_format
from codegrid.engine.sizes import Size

DEEP_TYPES = (torch.int32, torch.uint16)  # of pixels of 16 bits


def to_float(images: Tensor) -> Tensor:
    """Pixels, uint8 0..255 or of 16 bits 0..65535 -> float32 in [-1, 1], any shape."""
    return images.float() / (32767.5 if images.dtype in DEEP_TYPES else 127.5) - 1


def to_depth(x: Tensor, depth: int) -> Tensor:
    """Float in [-1, 1] -> pixels of 8 bits, uint8, or of 16, int32, clamped and rounded."""
    if depth == 8:
        return to_uint8(x)
    return ((x.float().clamp(-1, 1) + 1) * 32767.5).round().to(torch.int32)


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 0..255, clamped and rounded, as viewers, metrics and files get it."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_model_input(images: Tensor) -> Tensor:
    """Pixels (B, C, H, W) of either depth -> float in [-1, 1], in the memory format of `choose_memory_format`."""
    return to_float(images).contiguous(memory_format=choose_memory_format(images.device))


def crop_at(images: Tensor, corners: Tensor, size: Size) -> Tensor:
    """Crop `size` pixels from each image (B, C, H, W); `corners` (B, 2) are its upper left (row, column)."""
    rows, columns = (  # (B, size[0]) and (B, size[1])
        corners[:, axis, None] + torch.arange(size[axis], device=images.device) for axis in (0, 1)
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    cropped = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
