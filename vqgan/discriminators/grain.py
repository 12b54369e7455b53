"""A discriminator of texture: it sees a few pixels at a time, and nothing of what they belong to."""

from torch import nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting, check_size, write_size
from vqgan.discriminators.base import Layered, layer
from vqgan.networks.blocks import add_spectral_norm


class Grain(Layered):
    """Real or fake, patch by patch of `patch` pixels a side: (B, C, H, W) -> Judgement with logits (B, 1, H/2, W/2).

    Codes do not say where each speck of a texture is, and a decoder without noise can only put specks at places of its own,
    in rows along the grid. A discriminator that sees several of them recognises the rows, however real each speck looks, and
    drives the specks away. One that sees a single speck at a time (cf. the PixelGAN of Isola et al. 2017, section 4.4) only
    demands that each is as sharp and as dark as a real one.

    2x2 pixels move into channels, 3x3 convolutions see `patch` pixels, 1x1 convolutions judge. All have spectral norm
    (Miyato et al. 2018), because GroupNorm would see the whole image.
    """

    def __init__(self, image_size: SizeSetting, channels: int, width: int, patch: int) -> None:
        super().__init__()
        size = check_size("data.image_size", image_size, "pixel")
        if size[0] % 2 or size[1] % 2:
            raise InputError(
                f"data.image_size={write_size(size)} is odd, and loss/discriminator=grain sees 2x2 pixels at once; use patch there"
            )
        check_int("loss.discriminator.width", width, 1, "channels")
        if not isinstance(patch, int) or patch < 6 or patch % 4 != 2:
            raise InputError(
                f"loss.discriminator.patch={patch} must be 6, 10, 14 or 4 more pixels a side: what 3x3 convolutions see"
            )
        first = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, 1, 1), nn.LeakyReLU(0.2)
        )
        looks = [  # each 3x3 convolution widens the field of view by 4 pixels
            layer(nn.Conv2d(width * min(i, 2), 2 * width, 3, 1, 1), spectral=True)
            for i in range(1, (patch - 2) // 4)
        ]
        judge = layer(nn.Conv2d(2 * width if looks else width, 2 * width, 1), spectral=True)
        self.blocks = nn.ModuleList([first, *looks, judge])
        self.last = nn.Conv2d(2 * width, 1, 1)
        add_spectral_norm(self)
