"""Feature grids to images: the encoder's mirror image."""

from torch import Tensor, nn

from engine.errors import check_int
from vqgan.blocks import ResBlock, Up, group_norm, zero_init
from vqgan.encoder import plan_downsampling, plan_widths


class Decoder(nn.Module):
    """(B, in_channels, grid, grid) -> (B, channels, image_size, image_size), unbounded; `last` is its last convolution.

    The 4 x 4 pixels that the stem took at once come back in two steps with a nonlinearity between them: single pixels (edges,
    grain) are no linear function of a position's features.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        grid: int,
        width: int = 64,
        depth: int = 2,
        stem: int = 4,
        max_width_mult: int = 4,
    ) -> None:
        super().__init__()
        check_int("model.decoder.depth", depth, 0, "block")
        steps = plan_downsampling(image_size, grid, stem)
        levels = plan_widths(width, steps, max_width_mult)
        layers: list[nn.Module] = []
        for i in reversed(range(len(levels))):
            layers += [ResBlock(levels[i]) for _ in range(depth)]
            if i:
                layers.append(Up(levels[i], levels[i - 1], steps[i]))
        layers += [group_norm(width), nn.SiLU()]
        if steps[0] % 4 == 0:
            inner, at_once = max(width // 2, 1), steps[0] // 2
            layers += [Up(width, inner, 2, kernel=3), nn.SiLU()]
        else:
            inner, at_once = width, steps[0]
        self.layers = nn.Sequential(*layers)
        self.last = zero_init(nn.Conv2d(inner, channels * at_once**2, 3, padding=1))
        self.shuffle = nn.PixelShuffle(at_once)
        self.in_channels = levels[-1]

    def forward(self, h: Tensor) -> Tensor:
        x_hat: Tensor = self.shuffle(self.last(self.layers(h)))
        return x_hat
