"""How close reconstructions are to their images."""

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

from data.images import to_uint8

# Weights of the scales of MS-SSIM, the finest first (Wang et al. 2003).
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

SSIM_WINDOW = 11  # pixels per side


class Sharpness(Metric):
    """Gradient energy of the reconstructions relative to that of their images: 1 is equally sharp, 0 is flat.

    The energy is the sum of squared differences between neighbouring pixels, to the right and below, over the whole set.
    Noise has energy too: with a poor PSNR, a ratio near 1 doesn't show that the edges are in the right places.
    """

    full_state_update = False
    reconstructed: Tensor
    real: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("reconstructed", "real"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Both (B, C, H, W), in any common unit."""
        self.reconstructed += gradient_energy(x_hat)
        self.real += gradient_energy(x)

    def compute(self) -> Tensor:
        return (self.reconstructed / self.real).float()


def gradient_energy(x: Tensor) -> Tensor:
    """The sum of squared forward differences of images (B, C, H, W), float64."""
    return sum(
        (x.diff(dim=dim).square().sum(dtype=torch.float64) for dim in (2, 3)),
        torch.zeros((), device=x.device),
    )


class Reconstruction(MetricCollection):
    """PSNR in dB and SSIM, both means over images of the value of each image, and the sharpness of all images together.

    All are computed on 8-bit images, as a file would hold them. The PSNR of the pooled error of all images is lower, by
    about 0.5 dB on photographs: don't compare the two.
    """

    def __init__(self) -> None:
        psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
        ssim = StructuralSimilarityIndexMeasure(data_range=255.0)
        # Without compute_groups=False, a perfect first batch would merge metrics whose states are equal by chance.
        super().__init__(
            {"psnr": psnr, "ssim": ssim, "sharpness": Sharpness()}, compute_groups=False
        )

    def update(self, x: Tensor, x_hat: Tensor) -> None:  # type: ignore[override]
        """Both (B, C, H, W) in [-1, 1]."""
        super().update(to_uint8(x_hat).float(), to_uint8(x).float())


class PixelError(Metric):
    """The mean over all pixels and images of |x_hat - x|^power, with 8-bit pixels scaled to [0, 1]."""

    full_state_update = False
    total: Tensor
    n: Tensor

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Both (B, C, H, W), 0 to 255."""
        self.total += ((x_hat - x).abs() / 255).pow(self.power).sum(dtype=torch.float64)
        self.n += x.numel()

    def compute(self) -> Tensor:
        return (self.total / self.n).float()


class Fidelity(Reconstruction):
    """All scores of Reconstruction, l1 and l2 of pixels in [0, 1], and MS-SSIM, the mean over images (Wang et al. 2003).

    MS-SSIM uses as many of its five scales as images of `image_size` pixels have room for, with weights normalized to a sum
    of 1. `scales` is their number; with 0 there is no MS-SSIM.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.scales = count_scales(image_size)
        self.add_metrics({"l1": PixelError(1), "l2": PixelError(2)})
        if self.scales:
            weights = SCALE_WEIGHTS[: self.scales]
            betas = tuple(weight / sum(weights) for weight in weights)
            ms_ssim = MultiScaleStructuralSimilarityIndexMeasure(data_range=255.0, betas=betas)
            self.add_metrics({"ms_ssim": ms_ssim})


def count_scales(image_size: int) -> int:
    """The number of scales, each half as large as the one before, that hold a whole window.

    torchmetrics asks for a little more room than that.
    """
    fits = [
        n
        for n in range(1, len(SCALE_WEIGHTS) + 1)
        if image_size >= max(SSIM_WINDOW * 2 ** (n - 1), SSIM_WINDOW * (n - 1) ** 2)
    ]
    return max(fits, default=0)
