"""A discriminator of grain: it sees a few pixels at once, and nothing of what they are part of."""

from torch import nn

from engine.errors import InputError, check_int
from vqgan.blocks import add_spectral_norm
from vqgan.discriminators.patch import Layered, layer


class Grain(Layered):
    """Real or fake, patch by patch of `patch` pixels a side: (B, C, H, W) -> Judgement with logits (B, 1, H/2, W/2).

    Codes don't tell where each speck of a texture lies. A decoder without noise can put specks at places of its own, in rows
    along the grid; whoever sees a few of them together tells them from real ones whatever they look like, and drives them
    away. A discriminator that sees one at a time (cf. the PixelGAN of Isola et al. 2017, section 4.4) asks that
    each be as sharp and as dark as real ones. 2x2 pixels move into channels, 3x3 convolutions see
    `patch`, 1x1 convolutions judge; spectral norm (Miyato et al. 2018) on all, since GroupNorm would see the whole image.
    """

    def __init__(self, image_size: int, channels: int, width: int = 24, patch: int = 10) -> None:
        super().__init__()
        if image_size % 2:
            raise InputError(
                f"data.image_size={image_size} is odd, and loss/discriminator=grain sees 2x2 pixels at once; use patch there"
            )
        check_int("loss.discriminator.width", width, 1, "channels")
        if not isinstance(patch, int) or patch < 6 or patch % 4 != 2:
            raise InputError(
                f"loss.discriminator.patch={patch} must be 6, 10, 14 or 4 more pixels a side: what 3x3 convolutions see"
            )
        looks = (patch - 2) // 4
        first = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, 1, 1), nn.LeakyReLU(0.2)
        )
        seen = [
            layer(nn.Conv2d(width * min(i, 2), 2 * width, 3, 1, 1), spectral=True)
            for i in range(1, looks)
        ]
        judged = layer(nn.Conv2d(2 * width if seen else width, 2 * width, 1), spectral=True)
        self.blocks = nn.ModuleList([first, *seen, judged])
        self.last = nn.Conv2d(2 * width, 1, 1)
        add_spectral_norm(self)
