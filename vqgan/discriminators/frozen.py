"""A discriminator on the features of a pretrained network."""

from torch import Tensor, nn

from codegrid.engine.errors import check_int
from vqgan.backbones import FrozenNetwork
from vqgan.discriminators.base import Judgement, stack_logits
from vqgan.networks.blocks import GroupNorm, add_spectral_norm


class FrozenFeatures(nn.Module):
    """A small head on each layer of a frozen backbone (Sauer et al. 2021, Projected GANs, without its random projections).

    (B, C, H, W) -> Judgement with logits (B, layers, h', w'), smaller maps repeated to the size of the largest; the features
    are the backbone's. Only the heads are trained, and only they are in checkpoints.
    """

    def __init__(self, backbone: FrozenNetwork, width: int) -> None:
        super().__init__()
        check_int("loss.discriminator.width", width, 1, "channels")
        self.backbone = backbone
        self.heads = nn.ModuleList([head(channels, width) for channels in backbone.channels])

    def forward(self, x: Tensor) -> Judgement:
        features = self.backbone.features(x)
        logits = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return Judgement(stack_logits(logits), features)


def head(channels: int, width: int) -> nn.Sequential:
    """A map (B, channels, h, w) of any scale -> logits (B, 1, h, w)."""
    layers = nn.Sequential(
        GroupNorm(1, channels, affine=False),  # spectral norm does not correct a layer's scale
        nn.Conv2d(channels, width, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )
    add_spectral_norm(layers)
    return layers
