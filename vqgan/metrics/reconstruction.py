"""How close reconstructions come to their images."""

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from data.images import to_uint8


class Sharpness(Metric):
    """Gradient energy of the reconstructions over that of their images: 1 is as sharp as they are, 0 is flat.

    The energy is the sum of squared differences of neighbouring pixels, to the right and below, over the whole set. Noise
    has energy too: beside a poor PSNR a ratio near 1 does not say that the edges are where they belong.
    """

    full_state_update = False
    made: Tensor
    real: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("made", "real"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Both (B, C, H, W), in any one unit."""
        self.made += energy(x_hat)
        self.real += energy(x)

    def compute(self) -> Tensor:
        return (self.made / self.real).float()


def energy(x: Tensor) -> Tensor:
    """The sum of squared forward differences of images (B, C, H, W), float64."""
    return sum((x.diff(dim=dim).square().sum(dtype=torch.float64) for dim in (2, 3)), torch.zeros((), device=x.device))


class Reconstruction(MetricCollection):
    """PSNR in dB and SSIM, each the mean over images of the image's own value, and the sharpness of all images together.

    All are of 8-bit images as a file would hold them. The PSNR of the pooled error of all images is lower, by about 0.5 dB
    on photographs: don't compare the two.
    """

    def __init__(self) -> None:
        psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
        ssim = StructuralSimilarityIndexMeasure(data_range=255.0)
        super().__init__({"psnr": psnr, "ssim": ssim, "sharpness": Sharpness()})

    def update(self, x: Tensor, x_hat: Tensor) -> None:  # type: ignore[override]
        """Both (B, C, H, W) in [-1, 1]."""
        super().update(to_uint8(x_hat).float(), to_uint8(x).float())
