"""What the tokenizers of MaskGIT and of MAGVIT-v2 share: no attention, no biases in blocks, no convolution beside the codes."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from codegrid.engine.errors import check_int
from codegrid.engine.sizes import SizeSetting, check_size
from vqgan.networks.base import ImageDecoder, ImageEncoder, measure_f
from vqgan.networks.blocks import zero_init
from vqgan.networks.pyramid import (
    Place,
    PyramidBlock,
    count_levels,
    norm_of_groups,
    plan_level_widths,
)

UNBIASED_GROUPS = 32  # of channels in each normalisation

Layer = tuple[Place, nn.Module]


class UnbiasedBlock(PyramidBlock):
    """The pyramid's residual block without the biases of its convolutions."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width, UNBIASED_GROUPS)
        for conv in (self.conv1, self.conv2, self.shortcut):
            conv.register_parameter("bias", None)


def stack_blocks(
    block: type[UnbiasedBlock], first: Place, in_width: int, width: int, depth: int
) -> list[Layer]:
    """`depth` blocks from the place of the first on; the first changes the width."""
    check_int("model.depth", depth, 1, "block")
    return [
        (replace(first, number=i), block(width if i else in_width, width)) for i in range(depth)
    ]


class UnbiasedEncoder(ImageEncoder):
    """Images to grids of z_e, with `z_channels` features that no convolution follows.

    `depth` blocks a resolution and as many at the end; `width` times `mults` are the channels of the resolutions.
    """

    exit_kernel = 0
    sized_settings = ("image_size", "grid")
    block: ClassVar[type[UnbiasedBlock]]

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        width: int,
        mults: Sequence[int] | None,
        depth: int,
        z_channels: int,
    ) -> None:
        super().__init__()
        check_int("model.z_channels", z_channels, 1, "channel")
        levels = count_levels(image_size, grid)
        widths = plan_level_widths(levels, width, mults, None, UNBIASED_GROUPS)
        entry = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers: list[Layer] = [(Place("encoder", "entry"), entry)]
        in_width = width
        for level, level_width in enumerate(widths):
            first = Place("encoder", "block", level, level)
            layers += stack_blocks(self.block, first, in_width, level_width, depth)
            if level < levels - 1:
                layers.append((replace(first, kind="resample"), self.shrink(level_width)))
            in_width = level_width
        layers += [
            *stack_blocks(self.block, Place("encoder", "block"), in_width, in_width, depth),
            (Place("encoder", "norm"), norm_of_groups(in_width, UNBIASED_GROUPS)),
            (Place("encoder", "activation"), nn.SiLU()),
            (Place("encoder", "exit"), nn.Conv2d(in_width, z_channels, 1)),
        ]
        self.places = [place for place, _ in layers]
        self.layers = nn.Sequential(*(layer for _, layer in layers))
        self.image_size = check_size("data.image_size", image_size, "pixel")
        self.channels = channels
        self.grid = check_size("model.grid", grid, "code")
        self.f = measure_f(image_size, grid)
        self.out_channels = z_channels

    @abstractmethod
    def shrink(self, width: int) -> nn.Module:
        """The layer from one resolution to the next."""

    def forward(self, x: Tensor) -> Tensor:
        z_e: Tensor = self.layers(x)
        return z_e


class UnbiasedDecoder(ImageDecoder):
    """Grids of z_q, with `z_channels` features, to images: as many blocks as the encoder of the same `depth`."""

    entry_kernel = 0
    sized_settings = ("image_size", "grid")
    block: ClassVar[type[UnbiasedBlock]]
    sequence: ClassVar[type[nn.Sequential]] = nn.Sequential
    least_grid: ClassVar[int] = 1

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        width: int,
        mults: Sequence[int] | None,
        depth: int,
        z_channels: int,
    ) -> None:
        super().__init__()
        levels = count_levels(image_size, grid)
        check_size("model.grid", grid, "codes", self.least_grid)
        widths = plan_level_widths(levels, width, mults, None, UNBIASED_GROUPS)
        in_width = widths[-1]
        entry = nn.Conv2d(z_channels, in_width, 3, padding=1)
        layers: list[Layer] = [
            (Place("decoder", "entry"), entry),
            *stack_blocks(self.block, Place("decoder", "block"), in_width, in_width, depth),
        ]
        for step, level in enumerate(reversed(range(levels))):
            first = Place("decoder", "block", level, step)
            layers += [
                (replace(first, kind=kind), layer)
                for kind, layer in self.enter_level(in_width, z_channels).items()
            ]
            layers += stack_blocks(self.block, first, in_width, widths[level], depth)
            if level:
                layers.append((replace(first, kind="resample"), self.enlarge(widths[level])))
            in_width = widths[level]
        layers += [
            (Place("decoder", "norm"), norm_of_groups(in_width, UNBIASED_GROUPS)),
            (Place("decoder", "activation"), nn.SiLU()),
        ]
        self.places = [place for place, _ in layers]
        self.layers = self.sequence(*(layer for _, layer in layers))
        self.last = zero_init(nn.Conv2d(in_width, channels, 3, padding=1))
        self.in_channels = z_channels

    @abstractmethod
    def enlarge(self, width: int) -> nn.Module:
        """The layer from one resolution to the next."""

    def enter_level(self, width: int, z_channels: int) -> dict[str, nn.Module]:
        """Layers before the blocks of a resolution, at the width that enters it, by the kind of their place."""
        return {}

    def forward(self, z_q: Tensor) -> Tensor:
        x_hat: Tensor = self.last(self.layers(z_q))
        return x_hat
