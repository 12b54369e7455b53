"""PatchGAN."""

from typing import NamedTuple

from torch import Tensor, nn

from engine.errors import InputError, check_int
from vqgan.blocks import add_spectral_norm, group_norm


class Judgement(NamedTuple):
    """A discriminator's logits (B, scales, h', w'), larger for real, and what each of its layers saw, the first layer first.

    A scale, or whatever else judges on its own, counts as much as any other; a judgement of the whole image is (B, 1, 1, 1).
    """

    logits: Tensor
    features: list[Tensor]


class Layered(nn.Module):
    """Blocks one after the other and a last convolution to the logits: (B, C, H, W) -> Judgement."""

    blocks: nn.ModuleList
    last: nn.Conv2d

    def forward(self, x: Tensor) -> Judgement:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return Judgement(self.last(x), features)


class PatchGAN(Layered):
    """Real or fake, patch by patch (Isola et al. 2017, section 3.2): (B, C, H, W) -> Judgement.

    `depth` halvings and two 4x4 convolutions more, as in the paper; GroupNorm instead of BatchNorm, whose statistics
    would differ between real and fake batches and between ranks; `spectral` norm on every convolution instead of both.
    Raises InputError where images of `image_size`, if it is given, leave no logit.
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        depth: int = 2,
        spectral: bool = False,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        check_int("loss.discriminator.width", width, 1, "channels")
        check_int("loss.discriminator.depth", depth, 1, "halvings")
        if image_size is not None and image_size < least_size(depth):
            raise InputError(
                f"data.image_size={image_size} is too small for loss.discriminator.depth={depth}, which needs {least_size(depth)}; "
                "use a smaller depth, or loss/discriminator=fine"
            )
        blocks: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2))
        ]
        for i in range(1, depth + 1):
            inner, outer = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            blocks.append(
                layer(nn.Conv2d(inner, outer, 4, 2 if i < depth else 1, 1, bias=spectral), spectral)
            )
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(width * min(2**depth, 8), 1, 4, 1, 1)
        if spectral:
            add_spectral_norm(self)


def layer(conv: nn.Conv2d, spectral: bool) -> nn.Sequential:
    """A convolution, its norm, if that is not in its weights, and leaky relu."""
    return nn.Sequential(
        conv, nn.Identity() if spectral else group_norm(conv.out_channels), nn.LeakyReLU(0.2)
    )


def least_size(depth: int) -> int:
    """The smallest image, in pixels a side, of which a PatchGAN of this depth makes a logit."""
    return 3 * 2**depth
