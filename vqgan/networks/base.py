"""The contract of encoders and decoders: what a tokenizer and its training step need of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, SizeSetting, check_size, divides, write_size

SIDE_PAIRS = ("image_size", "grid")  # a list of one is [rows, columns]; others list resolutions


class ImageEncoder(nn.Module, ABC):
    """(B, channels, *image_size) in [-1, 1] -> (B, out_channels, *grid).

    image_size     (rows, columns) of pixels
    grid           (rows, columns) of codes
    f              pixels per grid position, in each direction; without places, those of the patches that it takes
    is_spatial     whether each code has a place, f x f pixels of the image; otherwise the codes are a sequence, grid (1, n),
                   of which each describes the whole image
    exit_kernel    side of the convolution that leads from its output to z_e; 0: its output is z_e
    layers         the part that takes most of the time, for torch.compile
    recomputed     the parts of `layers` whose activations the backward pass may compute again; no part lies in another

    A class whose weights serve images of any size that f divides names, in `sized_settings`, those of its settings that count
    pixels or codes a side: they follow the size of the images.
    """

    exit_kernel = 1
    is_spatial = True
    sized_settings: tuple[str, ...] = ()

    image_size: Size
    channels: int
    out_channels: int
    grid: Size
    f: int
    layers: nn.Module

    @property
    def recomputed(self) -> list[nn.Module]:
        return list_blocks(self.layers)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class ImageDecoder(nn.Module, ABC):
    """(B, in_channels, *grid) -> (B, channels, *image_size), about [-1, 1] but not bounded.

    entry_kernel    side of the convolution that leads from z_q to its input; 0: its input is z_q
    layers          the part that takes most of the time, for torch.compile
    recomputed      as in ImageEncoder
    last            its last convolution, at whose weights lambda compares the losses

    `sized_settings` are as in ImageEncoder.
    """

    sized_settings: tuple[str, ...] = ()

    in_channels: int
    entry_kernel: int
    layers: nn.Module
    last: nn.Conv2d

    @property
    def recomputed(self) -> list[nn.Module]:
        return list_blocks(self.layers)

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor: ...


def list_blocks(layers: nn.Module) -> list[nn.Module]:
    """The children that save more than their input for the backward pass: those with two or more layers with weights, such as
    residual blocks, and those that enlarge the map before their convolution. Without such children, the module itself."""
    blocks = [part for part in layers.children() if count_weighted(part) > 1 or enlarges(part)]
    return blocks or [layers]


def count_weighted(part: nn.Module) -> int:
    """The number of layers in a part, itself among them, that have weights of their own."""
    return sum(
        1 for layer in part.modules() if next(layer.parameters(recurse=False), None) is not None
    )


def enlarges(part: nn.Module) -> bool:
    """Whether a part says that it enlarges the map before its convolution, which would save the large one."""
    return bool(getattr(part, "enlarges_first", False))


def measure_f(image_size: SizeSetting, grid: SizeSetting, of_sequences: str = "model=vit") -> int:
    """Pixels per grid position, the same in both directions. Raises InputError unless the grid divides the image; `of_sequences`
    is the setting with which one row is a sequence of codes."""
    size = check_size("data.image_size", image_size, "pixel")
    codes = check_size("model.grid", grid, "code")
    f = size[0] // codes[0]
    if size == (codes[0] * f, codes[1] * f):
        return f
    divisors = [n for n in range(1, min(size) + 1) if divides(n, size)]
    best = min(divisors, key=lambda n: (abs(size[0] // n - codes[0]), abs(size[1] // n - codes[1])))
    wanted = max(round(size[0] / codes[0]), 1)
    sequence = f"; a sequence of codes needs {of_sequences}" if codes[0] == 1 < codes[1] else ""
    raise InputError(
        f"data.image_size={write_size(size)} is not model.grid={write_size(codes)} times one whole number; "
        f"use model.grid={write_size([side // best for side in size])} or "
        f"data.image_size={write_size([side * wanted for side in codes])}{sequence}"
    )


def scale_settings(
    settings: dict[str, Any], names: Sequence[str], size: Size, before: Size
) -> None:
    """Change settings that count pixels or codes a side as the images' size changes, in place. Of a list of resolutions, those
    whose sides stay whole numbers stay: the others are of no resolution of the network."""
    for name in names:
        sides = settings.get(name)
        if sides is None:
            continue
        if isinstance(sides, Sequence) and name not in SIDE_PAIRS:
            scaled = [scale_size(each, size, before) for each in sides]
            settings[name] = [each for each in scaled if each is not None]
        elif (scaled_size := scale_size(sides, size, before)) is not None:
            settings[name] = scaled_size


def scale_size(sides: SizeSetting, size: Size, before: Size) -> int | list[int] | None:
    """A size, of pixels or of codes, as large a part of images of `size` as it is of those `before`; None if it isn't whole."""
    pair = (sides, sides) if isinstance(sides, int) else tuple(sides)
    if isinstance(sides, int) and before[0] != before[1]:  # the shorter side of a rectangle
        pair = tuple(sides * side // min(before) for side in before)
    if any(n * new % old for n, new, old in zip(pair, size, before, strict=True)):
        return None
    scaled = [n * new // old for n, new, old in zip(pair, size, before, strict=True)]
    return scaled[0] if scaled[0] == scaled[1] else scaled
