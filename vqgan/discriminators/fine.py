"""A discriminator for small images, where single pixels count."""

from torch import nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting, check_size, write_size
from vqgan.discriminators.base import Layered, layer
from vqgan.networks.blocks import add_spectral_norm


class Fine(Layered):
    """Real or fake, patch by patch of 28 pixels: (B, C, H, W) -> Judgement with logits (B, 1, H/4, W/4).

    A PatchGAN (Isola et al. 2017) whose first layer moves 2x2 pixels into channels instead of striding over them, then
    3x3 convolutions at half and a quarter of the resolution; `spectral` norm on every convolution instead of GroupNorm.
    """

    def __init__(self, image_size: SizeSetting, channels: int, width: int, spectral: bool) -> None:
        super().__init__()
        size = check_size("data.image_size", image_size, "pixel")
        if size[0] % 4 or size[1] % 4:
            raise InputError(
                f"data.image_size={write_size(size)} is not divisible by 4, as loss/discriminator=fine needs; use patch there"
            )
        check_int("loss.discriminator.width", width, 1, "channels")
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, 1, 1), nn.LeakyReLU(0.2)
                ),
                layer(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=spectral), spectral),
                layer(nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=spectral), spectral),
            ]
        )
        self.last = nn.Conv2d(2 * width, 1, 3, 1, 1)
        if spectral:
            add_spectral_norm(self)
