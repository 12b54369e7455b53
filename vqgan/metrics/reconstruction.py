"""How close reconstructions come to their images."""

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from data.images import to_uint8


class Reconstruction(MetricCollection):
    """PSNR in dB and SSIM, each the mean over images of the image's own value, on 8-bit images as a file would hold them.

    The PSNR of the pooled error of all images is lower, by about 0.5 dB on photographs: don't compare the two.
    """

    def __init__(self) -> None:
        psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
        super().__init__({"psnr": psnr, "ssim": StructuralSimilarityIndexMeasure(data_range=255.0)})

    def update(self, x: Tensor, x_hat: Tensor) -> None:  # type: ignore[override]
        """Both (B, C, H, W) in [-1, 1]."""
        super().update(to_uint8(x_hat).float(), to_uint8(x).float())
