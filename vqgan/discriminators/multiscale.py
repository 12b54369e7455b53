"""PatchGANs on an image and on smaller copies of it."""

import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting, check_size, write_size
from vqgan.discriminators.base import Judgement, stack_logits
from vqgan.discriminators.patch import PatchGAN, least_size


class MultiScale(nn.Module):
    """A PatchGAN for each of `scales` sizes of the image (Wang et al. 2018, pix2pixHD, section 3.2): (B, C, H, W) -> Judgement.

    From scale to scale the image is averaged over 2x2 pixels. The logits are (B, scales, h', w'), the finest scale first
    and coarser ones repeated to its size. The features are those of all scales, one scale after the other.
    """

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        scales: int,
        width: int,
        depth: int,
        spectral: bool,
    ) -> None:
        super().__init__()
        check_int("loss.discriminator.scales", scales, 1)
        check_int("loss.discriminator.depth", depth, 1, "halvings")
        size = check_size("data.image_size", image_size, "pixel")
        coarsest, least = min(size) // 2 ** (scales - 1), least_size(depth)
        if coarsest < least:
            raise InputError(
                f"data.image_size={write_size(size)} leaves {coarsest} pixels at scale {scales} of "
                f"loss/discriminator=multiscale, where depth={depth} needs {least}; use fewer "
                "loss.discriminator.scales, a smaller depth, or loss/discriminator=fine"
            )
        self.scales = nn.ModuleList(
            [PatchGAN(channels, width, depth, spectral) for _ in range(scales)]
        )

    def forward(self, x: Tensor) -> Judgement:
        judgements = []
        for i, scale in enumerate(self.scales):
            x = F.avg_pool2d(x, 2) if i else x
            judgements.append(scale(x))
        features = [f for judgement in judgements for f in judgement.features]
        return Judgement(stack_logits([judgement.logits for judgement in judgements]), features)
