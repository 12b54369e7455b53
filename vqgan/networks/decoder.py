"""Feature grids to images: the mirror image of the encoder."""

from collections.abc import Sequence

from torch import Tensor, nn

from codegrid.engine.sizes import SizeSetting
from vqgan.networks.base import ImageDecoder
from vqgan.networks.blocks import ResBlock, Up, group_norm, zero_init
from vqgan.networks.encoder import plan_depths, plan_downsampling, plan_widths


class Decoder(ImageDecoder):
    """(B, in_channels, *grid) -> (B, channels, *image_size), unbounded.

    `last` is its last convolution. Where the stem takes 4 x 4 pixels at once, they are decoded in two steps with a
    nonlinearity in between, because single pixels (edges, grain) are no linear function of the features of a position.
    """

    entry_kernel = 3
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
        depths = plan_depths("model.decoder.depth", depth, len(steps))
        layers: list[nn.Module] = []
        for i in reversed(range(len(widths))):
            layers += [ResBlock(widths[i]) for _ in range(depths[i])]
            if i:
                layers.append(Up(widths[i], widths[i - 1], steps[i]))
        layers += [group_norm(width), nn.SiLU()]
        last_width, last_step = width, steps[0]
        if last_step % 4 == 0:
            last_width, last_step = max(width // 2, 1), last_step // 2
            layers += [Up(width, last_width, 2, kernel=3), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.last = zero_init(nn.Conv2d(last_width, channels * last_step**2, 3, padding=1))
        self.shuffle = nn.PixelShuffle(last_step)
        self.in_channels = widths[-1]

    def forward(self, h: Tensor) -> Tensor:
        x_hat: Tensor = self.shuffle(self.last(self.layers(h)))
        return x_hat
