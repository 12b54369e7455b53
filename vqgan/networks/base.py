"""The contract of encoders and decoders: what a tokenizer and its training step need of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ImageEncoder(nn.Module, ABC):
    """(B, channels, image_size, image_size) in [-1, 1] -> (B, out_channels, h, w).

    grid           (h, w)
    f              pixels per grid position, in each direction
    exit_kernel    side of the convolution that leads from its output to z_e; 0: its output is z_e
    layers         the part that takes most of the time, for torch.compile

    A class whose weights serve images of any size that f divides names, in `sized_settings`, those of its settings that count
    pixels or codes a side: they follow the size of the images.
    """

    exit_kernel = 1
    sized_settings: tuple[str, ...] = ()

    image_size: int
    channels: int
    out_channels: int
    grid: tuple[int, int]
    f: int
    layers: nn.Module

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class ImageDecoder(nn.Module, ABC):
    """(B, in_channels, h, w) -> (B, channels, image_size, image_size), about [-1, 1] but not bounded.

    entry_kernel    side of the convolution that leads from z_q to its input; 0: its input is z_q
    layers          the part that takes most of the time, for torch.compile
    last            its last convolution, at whose weights lambda compares the losses

    `sized_settings` are as in ImageEncoder.
    """

    sized_settings: tuple[str, ...] = ()

    in_channels: int
    entry_kernel: int
    layers: nn.Module
    last: nn.Conv2d

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor: ...


def scale_settings(settings: dict[str, Any], names: Sequence[str], size: int, before: int) -> None:
    """Multiply settings that count pixels or codes a side by size / before, in place. Of a list, the sides that this leaves
    whole stay: the others are of no resolution of the network."""
    for name in names:
        sides = settings.get(name)
        if isinstance(sides, list | tuple):
            settings[name] = [n * size // before for n in sides if n * size % before == 0]
        elif isinstance(sides, int):
            settings[name] = sides * size // before
