"""PatchGANs on an image and on its reductions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError, check_int
from vqgan.discriminators.patch import Judgement, PatchGAN, least_size


class MultiScale(nn.Module):
    """A PatchGAN for each of `scales` sizes of the image (Wang et al. 2018, pix2pixHD, section 3.2): (B, C, H, W) -> Judgement.

    From scale to scale the image is averaged over 2x2 pixels. The logits are (B, scales, h', w'), the finest scale first,
    those of coarser ones repeated to its size; the features are those of all scales, one after the other.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        scales: int = 2,
        width: int = 32,
        depth: int = 2,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        check_int("loss.discriminator.scales", scales, 1)
        check_int("loss.discriminator.depth", depth, 1, "halvings")
        coarsest, least = image_size // 2 ** (scales - 1), least_size(depth)
        if coarsest < least:
            raise InputError(
                f"data.image_size={image_size} leaves {coarsest} pixels at scale {scales} of loss/discriminator=multiscale, where "
                f"depth={depth} needs {least}; use fewer loss.discriminator.scales, a smaller depth, or loss/discriminator=fine"
            )
        self.scales = nn.ModuleList(
            [PatchGAN(channels, width, depth, spectral) for _ in range(scales)]
        )

    def forward(self, x: Tensor) -> Judgement:
        judgements = []
        for i, scale in enumerate(self.scales):
            x = F.avg_pool2d(x, 2) if i else x
            judgements.append(scale(x))
        return Judgement(
            stacked([j.logits for j in judgements]), [f for j in judgements for f in j.features]
        )


def stacked(logits: list[Tensor]) -> Tensor:
    """Maps of logits (B, 1, h_i, w_i) -> (B, len(logits), h', w') by nearest neighbour, at the size of the largest."""
    size = max((tuple(m.shape[2:]) for m in logits), key=lambda s: s[0] * s[1])
    return torch.cat([F.interpolate(m, size=size) for m in logits], 1)
