"""A discriminator on the features of a network that others have trained."""

from torch import Tensor, nn

from engine.errors import check_int
from vqgan.backbones import FrozenNetwork
from vqgan.blocks import add_spectral_norm
from vqgan.discriminators.multiscale import stacked
from vqgan.discriminators.patch import Judgement


class FrozenFeatures(nn.Module):
    """A small head on each layer of a frozen backbone (Sauer et al. 2021, Projected GANs, without its random projections).

    (B, C, H, W) -> Judgement with logits (B, layers, h', w'), of smaller maps repeated to the size of the largest; the
    features are the backbone's. Only the heads train, and only they are in checkpoints.
    """

    def __init__(self, backbone: FrozenNetwork, width: int = 64) -> None:
        super().__init__()
        check_int("loss.discriminator.width", width, 1, "channels")
        self.backbone = backbone
        self.heads = nn.ModuleList([head(channels, width) for channels in backbone.channels])

    def forward(self, x: Tensor) -> Judgement:
        features = self.backbone.features(x)
        return Judgement(
            stacked([head(f) for head, f in zip(self.heads, features, strict=True)]), features
        )


def head(channels: int, width: int) -> nn.Sequential:
    """A map (B, channels, h, w) of any scale -> logits (B, 1, h, w)."""
    made = nn.Sequential(
        nn.GroupNorm(
            1, channels, affine=False
        ),  # spectral norm can't make up for a layer of large or small values
        nn.Conv2d(channels, width, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )
    add_spectral_norm(made)
    return made
