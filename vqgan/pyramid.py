"""The ResNet with attention of VQGAN (Esser et al. 2021), which public tokenizers share: each level halves the image."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError, check_int
from vqgan.blocks import zero_init
from vqgan.networks import ImageDecoder, ImageEncoder

NORM_GROUPS = 32  # of each normalisation, so widths are multiples of it

# Widths as multiples of the first, by the number of resolutions: those of latent diffusion's f4 and f8, and of taming's f16.
WIDTH_MULTS = {
    1: [1],
    2: [1, 2],
    3: [1, 2, 4],
    4: [1, 2, 2, 4],
    5: [1, 1, 2, 2, 4],
    6: [1, 1, 2, 2, 4, 4],
}


def count_levels(image_size: int, grid: int) -> int:
    """The number of resolutions from the image down to the grid, each half of the one before.

    Raises InputError unless image_size / grid is a power of 2.
    """
    check_int("model.grid", grid, 1, "code a side")
    f, rest = divmod(image_size, grid)
    if rest or f < 1 or f & (f - 1):
        powers = [image_size >> i for i in range(12) if image_size % (1 << i) == 0]
        raise InputError(
            f"model.grid={grid} is not data.image_size={image_size} halved several times, as model=pyramid needs; "
            f"choose one of {', '.join(map(str, powers))}, or model=conv"
        )
    return f.bit_length()


def plan_levels(levels: int, width: int, mults: Sequence[int] | None) -> list[int]:
    """The channels of each resolution, from the image's down to the grid's. Raises InputError for widths that can't work."""
    check_int("model.width", width, 1, "channel")
    if mults is None:
        if levels not in WIDTH_MULTS:
            raise InputError(
                f"model.mults=null serves 1 to 6 resolutions; give all {levels} of them"
            )
        mults = WIDTH_MULTS[levels]
    if len(mults) != levels:
        raise InputError(
            f"model.mults={list(mults)} must have {levels} numbers, one for each resolution from the image to the grid"
        )
    widths = [width * mult for mult in mults]
    for mult, channels in zip(mults, widths, strict=True):
        check_int("model.mults", mult, 1)
        if channels % NORM_GROUPS:
            raise InputError(
                f"model.width={width} times {mult} must be a multiple of {NORM_GROUPS} channels, which normalisation groups"
            )
    return widths


def norm_of_groups(width: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups."""
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)


class PyramidBlock(nn.Module):
    """Pre-activation residual block from one width to another."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.norm1 = norm_of_groups(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2 = norm_of_groups(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        y: Tensor = self.shortcut(x) + h
        return y


class PositionAttention(nn.Module):
    """Attention with one head over all positions of a map, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm_of_groups(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        rows = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(*rows)  # (B, h*w, width)
        y: Tensor = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return y


class Halve(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded at the right and at the bottom alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    """Each pixel becomes 2x2 equal ones, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def stack_level(in_width: int, width: int, depth: int, attends: bool) -> list[nn.Module]:
    """`depth` residual blocks, each followed by attention if the level `attends`."""
    check_int("model.depth", depth, 1, "block")
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(PyramidBlock(width if i else in_width, width))
        if attends:
            layers.append(PositionAttention(width))
    return layers


def stack_middle(width: int) -> list[nn.Module]:
    """The blocks at the grid's resolution, with attention in any case."""
    return [PyramidBlock(width, width), PositionAttention(width), PyramidBlock(width, width)]


class PyramidEncoder(ImageEncoder):
    """Images to grids of `z_channels` features.

    `depth` blocks a resolution; `attention` are the sides in pixels of the resolutions with attention; `width` times `mults` are
    their channels.
    """

    sized_settings = ("image_size", "grid", "attention")

    def __init__(
        self,
        image_size: int,
        channels: int,
        grid: int,
        width: int,
        mults: Sequence[int] | None,
        depth: int,
        attention: Sequence[int],
        z_channels: int,
    ) -> None:
        super().__init__()
        check_int("model.z_channels", z_channels, 1, "channel")
        levels = count_levels(image_size, grid)
        widths = plan_levels(levels, width, mults)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        in_width = width
        for level, level_width in enumerate(widths):
            layers += stack_level(in_width, level_width, depth, image_size >> level in attention)
            if level < levels - 1:
                layers.append(Halve(level_width))
            in_width = level_width
        layers += [*stack_middle(in_width), norm_of_groups(in_width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(in_width, z_channels, 3, padding=1))
        self.image_size, self.channels, self.grid = image_size, channels, (grid, grid)
        self.f = image_size // grid
        self.out_channels = z_channels

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h


class PyramidDecoder(ImageDecoder):
    """Grids of `z_channels` features to images: one block more a resolution than the encoder of the same `depth`."""

    entry_kernel = 1
    sized_settings = ("image_size", "grid", "attention")

    def __init__(
        self,
        image_size: int,
        channels: int,
        grid: int,
        width: int,
        mults: Sequence[int] | None,
        depth: int,
        attention: Sequence[int],
        z_channels: int,
    ) -> None:
        super().__init__()
        levels = count_levels(image_size, grid)
        widths = plan_levels(levels, width, mults)
        in_width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(z_channels, in_width, 3, padding=1)]
        layers += stack_middle(in_width)
        for level in reversed(range(levels)):
            attends = image_size >> level in attention
            layers += stack_level(in_width, widths[level], depth + 1, attends)
            if level:
                layers.append(Double(widths[level]))
            in_width = widths[level]
        self.layers = nn.Sequential(*layers, norm_of_groups(in_width), nn.SiLU())
        self.last = zero_init(nn.Conv2d(in_width, channels, 3, padding=1))
        self.in_channels = z_channels

    def forward(self, h: Tensor) -> Tensor:
        x_hat: Tensor = self.last(self.layers(h))
        return x_hat
