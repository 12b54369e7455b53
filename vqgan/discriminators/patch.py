"""PatchGAN."""

from torch import nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting, check_size, write_size
from vqgan.discriminators.base import Layered, layer
from vqgan.networks.blocks import add_spectral_norm


class PatchGAN(Layered):
    """Real or fake, patch by patch (Isola et al. 2017, section 3.2): (B, C, H, W) -> Judgement.

    `depth` halvings and two more 4x4 convolutions, as in the paper. GroupNorm replaces BatchNorm, whose statistics would
    differ between real and fake batches and between ranks; `spectral` norm on every convolution replaces both. Raises
    InputError if images of `image_size`, where it is passed, are too small to give a logit.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        spectral: bool,
        image_size: SizeSetting | None = None,
    ) -> None:
        super().__init__()
        check_int("loss.discriminator.width", width, 1, "channels")
        check_int("loss.discriminator.depth", depth, 1, "halvings")
        size = None if image_size is None else check_size("data.image_size", image_size, "pixel")
        if size is not None and min(size) < least_size(depth):
            raise InputError(
                f"data.image_size={write_size(size)} is too small for loss.discriminator.depth={depth}, which needs "
                f"{least_size(depth)}; use a smaller depth, or loss/discriminator=fine"
            )
        blocks: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2))
        ]
        for i in range(1, depth + 1):
            inner, outer = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < depth else 1
            blocks.append(layer(nn.Conv2d(inner, outer, 4, stride, 1, bias=spectral), spectral))
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(width * min(2**depth, 8), 1, 4, 1, 1)
        if spectral:
            add_spectral_norm(self)


def least_size(depth: int) -> int:
    """The smallest image, in pixels a side, for which a PatchGAN of this depth has a logit."""
    return 3 * 2**depth
