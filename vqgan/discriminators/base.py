"""What every discriminator returns, and what several of them are built from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan.networks.blocks import group_norm


class Judgement(NamedTuple):
    """The logits of a discriminator (B, scales, h', w'), larger for real images, and the features of its layers, first to last.

    A scale, or any other part that judges on its own, is a channel and counts like the others. A single judgement of the
    whole image is (B, 1, 1, 1).
    """

    logits: Tensor
    features: list[Tensor]


class Layered(nn.Module):
    """A sequence of blocks and a last convolution to the logits: (B, C, H, W) -> Judgement."""

    blocks: nn.ModuleList
    last: nn.Conv2d

    def forward(self, x: Tensor) -> Judgement:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return Judgement(self.last(x), features)


def layer(conv: nn.Conv2d, spectral: bool) -> nn.Sequential:
    """A convolution, GroupNorm unless the weights are normalised (`spectral`), and leaky ReLU."""
    return nn.Sequential(
        conv, nn.Identity() if spectral else group_norm(conv.out_channels), nn.LeakyReLU(0.2)
    )


def stack_logits(logits: list[Tensor]) -> Tensor:
    """Maps (B, 1, h_i, w_i) -> (B, len(logits), h', w'), by nearest neighbour to the size of the largest."""
    size = max((tuple(m.shape[2:]) for m in logits), key=lambda s: s[0] * s[1])
    return torch.cat([F.interpolate(m, size=size) for m in logits], 1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, a loss passes through the module without a trace: no gradients to its weights, no moved running statistics."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    was_training = module.training
    for p in trainable:
        p.requires_grad_(False)
    module.eval()  # spectral norm continues its power iteration in training mode
    try:
        yield
    finally:
        module.train(was_training)
        for p in trainable:
            p.requires_grad_(True)
