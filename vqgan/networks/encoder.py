"""Images to feature grids by convolutions whose depth follows from the image size and the grid."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting, check_size
from vqgan.networks.base import ImageEncoder, measure_f
from vqgan.networks.blocks import Down, ResBlock, group_norm


def plan_downsampling(image_size: SizeSetting, grid: SizeSetting, stem: int) -> list[int]:
    """The downsampling f = image_size / grid as steps: at most `stem` for the stem, then one prime factor each.

    64 pixels, grid 8, stem 4 -> [4, 2]. Raises InputError if the grid does not divide the image.
    """
    steps = [1]
    remaining = measure_f(image_size, grid)
    prime = 2
    while remaining > 1:
        while remaining % prime == 0:
            remaining //= prime
            if len(steps) == 1 and steps[0] * prime <= max(stem, 1):
                steps[0] *= prime
            else:
                steps.append(prime)
        prime += 1
    return steps


def plan_widths(width: int, steps: list[int], max_width_mult: int) -> list[int]:
    """The channels after each step: doubled at each, up to `max_width_mult` times the first."""
    check_int("model.width", width, 1, "channel")
    check_int("model.encoder.max_width_mult", max_width_mult, 1)
    return [width * min(2**i, max_width_mult) for i in range(len(steps))]


def plan_depths(name: str, depth: int | Sequence[int], levels: int) -> list[int]:
    """The residual blocks of each resolution, from the stem's to the grid's: as many at all, or a list of them.

    Raises InputError, with the setting's `name`, for a list of another length and for numbers that are no counts.
    """
    is_list = isinstance(depth, Sequence) and not isinstance(depth, str)
    depths: list[Any] = list(depth) if is_list else [depth] * levels  # type: ignore[arg-type]
    for number in depths:
        check_int(name, number, 0, "block")
    if len(depths) != levels:
        raise InputError(
            f"{name}={depths} must have a number for each of the {levels} resolutions from the stem's to the grid's; "
            f"use {name}={depths[-1] if depths else 1} for all of them, or that many numbers"
        )
    return depths


class Encoder(ImageEncoder):
    """(B, channels, *image_size) -> (B, out_channels, *grid).

    The stem moves `stem` x `stem` pixels into channels at once, which loses nothing of the image and saves most of the
    time at full resolution; stem=1 is the classical pyramid. `depth` residual blocks follow each downsampling step, or as
    many as a list of them says.
    """

    sized_settings = ("image_size", "grid")

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        width: int,
        depth: int | Sequence[int],
        stem: int,
        max_width_mult: int,
    ) -> None:
        super().__init__()
        steps = plan_downsampling(image_size, grid, stem)
        widths = plan_widths(width, steps, max_width_mult)
        depths = plan_depths("model.encoder.depth", depth, len(steps))
        layers: list[nn.Module] = []
        in_width, kernel = channels, 3
        for step, out_width, number in zip(steps, widths, depths, strict=True):
            layers.append(Down(in_width, out_width, step, kernel))
            layers += [ResBlock(out_width) for _ in range(number)]
            in_width, kernel = out_width, 1
        self.layers = nn.Sequential(*layers, group_norm(in_width), nn.SiLU())
        self.image_size = check_size("data.image_size", image_size, "pixel")
        self.channels = channels
        self.grid = check_size("model.grid", grid, "code")
        self.f = measure_f(image_size, grid)
        self.out_channels = in_width

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h
