"""PatchGAN."""

from typing import NamedTuple

from torch import Tensor, nn

from vqgan.blocks import norm


class Judgement(NamedTuple):
    """A discriminator's logits (B, 1, h', w'), larger for real, and what each of its layers saw, the first layer first."""

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
    would differ between real and fake batches and between ranks.
    """

    def __init__(self, channels: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2))]
        for i in range(1, depth + 1):
            inner, outer = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            conv = nn.Conv2d(inner, outer, 4, 2 if i < depth else 1, 1, bias=False)
            blocks.append(nn.Sequential(conv, norm(outer), nn.LeakyReLU(0.2)))
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(width * min(2**depth, 8), 1, 4, 1, 1)
