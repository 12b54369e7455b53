"""How close reconstructions come to their images."""

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

from data.images import to_uint8

BETAS = (
    0.0448,
    0.2856,
    0.3001,
    0.2363,
    0.1333,
)  # weights of the scales of MS-SSIM, the finest first (Wang et al. 2003)

WINDOW = 11  # pixels a side of what SSIM looks at


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
    return sum(
        (x.diff(dim=dim).square().sum(dtype=torch.float64) for dim in (2, 3)),
        torch.zeros((), device=x.device),
    )


class Reconstruction(MetricCollection):
    """PSNR in dB and SSIM, each the mean over images of the image's own value, and the sharpness of all images together.

    All are of 8-bit images as a file would hold them. The PSNR of the pooled error of all images is lower, by about 0.5 dB
    on photographs: don't compare the two.
    """

    def __init__(self) -> None:
        psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
        ssim = StructuralSimilarityIndexMeasure(data_range=255.0)
        # Grouped by equal states, as a MetricCollection does by itself, a perfect first batch would merge what differs later.
        super().__init__(
            {"psnr": psnr, "ssim": ssim, "sharpness": Sharpness()}, compute_groups=False
        )

    def update(self, x: Tensor, x_hat: Tensor) -> None:  # type: ignore[override]
        """Both (B, C, H, W) in [-1, 1]."""
        super().update(to_uint8(x_hat).float(), to_uint8(x).float())


class PixelError(Metric):
    """The mean over all pixels and images of |x_hat - x|^power, of 8-bit pixels as numbers from 0 to 1."""

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
    """What Reconstruction tells, and l1 and l2 of pixels from 0 to 1, and MS-SSIM, the mean over images (Wang et al. 2003).

    Of MS-SSIM's five scales there are as many as images of `image_size` pixels have room for, their weights brought to
    the sum of 1: `scales`, 0 where there is room for none.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.scales = scales(image_size)
        self.add_metrics({"l1": PixelError(1), "l2": PixelError(2)})
        if self.scales:
            betas = tuple(beta / sum(BETAS[: self.scales]) for beta in BETAS[: self.scales])
            self.add_metrics(
                {
                    "ms_ssim": MultiScaleStructuralSimilarityIndexMeasure(
                        data_range=255.0, betas=betas
                    )
                }
            )


def scales(image_size: int) -> int:
    """How many scales, each half as large as the one before, hold a whole window; torchmetrics wants a little more room."""
    fits = [
        n
        for n in range(1, len(BETAS) + 1)
        if image_size >= max(WINDOW * 2 ** (n - 1), WINDOW * (n - 1) ** 2)
    ]
    return max(fits, default=0)
