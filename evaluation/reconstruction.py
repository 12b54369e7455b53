"""How close reconstructions are to their images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

from codegrid.data.images import to_depth
from codegrid.engine.precision import without_autocast
from codegrid.engine.sizes import SizeSetting, check_size
from codegrid.evaluation.scores import LEAST_SQUARED_ERROR

# Weights of the scales of MS-SSIM, the finest first (Wang et al. 2003).
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

SSIM_WINDOW = 11  # pixels per side
SSIM_SIGMA = 1.5  # pixels, of its Gaussian weights
WINDOWS_AT_ONCE = 2**20  # numbers that are averaged over windows together, 4 MiB

# All metrics take images whose lowest pixel is 0 and whose highest is this, at every depth: 16 bits have 257 steps a level.
WHITE = 255


class ImagePSNR(PeakSignalNoiseRatio):
    """The mean over images of each image's PSNR in dB.

    No image's mean squared error counts as less than LEAST_SQUARED_ERROR in steps of the pixels: an image that is reproduced
    without error would make the mean infinite, whatever the others are like.
    """

    def __init__(self) -> None:
        super().__init__(data_range=float(WHITE), dim=(1, 2, 3))

    def update(self, preds: Tensor, target: Tensor, step: float = 1) -> None:
        """Both (B, C, H, W), 0 to WHITE in steps of `step`."""
        super().update(preds, target)
        errors = self.sum_squared_error
        assert isinstance(errors, list)
        errors[-1] = floor_squared_error(errors[-1], step, preds[0].numel())


def floor_squared_error(errors: Tensor, step: float = 1, pixels: int = 1) -> Tensor:
    """Squared errors of images, summed over so many pixels, that are no less than those of rounding to steps of this size."""
    return errors.clamp(min=LEAST_SQUARED_ERROR * step**2 * pixels)


@dataclass(frozen=True, eq=False)
class Structure:
    """How alike images and their reconstructions are, window by window (Wang et al. 2004, eq. 12).

    `differ` (B,) are the images that are not reproduced exactly, and `x_hat` and `x` (n, C, H, W) those alone. `similarity` (n,)
    is the mean of each one's SSIM, and `contrast` (n,) that of SSIM's second factor, contrast times structure.
    """

    differ: Tensor
    x_hat: Tensor
    x: Tensor
    similarity: Tensor
    contrast: Tensor

    @classmethod
    def of(cls, x_hat: Tensor, x: Tensor) -> "Structure":
        """Both (B, C, H, W), 0 to WHITE; NaN for images without room for a window."""
        differ = find_differing(x_hat, x)
        x_hat, x = select_images(differ, x_hat, x)
        if has_room(x) and len(x):
            similarity, contrast = compare_windows(x_hat, x)
        else:
            similarity = contrast = x.new_full((len(x),), torch.nan)
        return cls(differ, x_hat, x, similarity, contrast)


def has_room(images: Tensor) -> bool:
    """Whether images (B, C, H, W) are as large as the mirrored border of a window."""
    return min(images.shape[2:]) > SSIM_WINDOW // 2


def compare_windows(x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its second factor, contrast and structure, of images (n, C, H, W), 0 to WHITE, both means (n,) over an image.

    They equal torchmetrics'. Images are compared a few at a time, which stay in the processor's cache.
    """
    at_once = max(1, WINDOWS_AT_ONCE // (5 * x[0].numel()))
    parts = zip(x_hat.split(at_once), x.split(at_once), strict=True)
    scores = [_compare_windows(*part) for part in parts]
    similarity, contrast = zip(*scores, strict=True)
    return torch.cat(similarity), torch.cat(contrast)


def _compare_windows(x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    c1, c2 = ((k * WHITE) ** 2 for k in (0.01, 0.03))
    border = SSIM_WINDOW // 2
    y, z = (F.pad(each, [border] * 4, mode="reflect") for each in (x_hat, x))
    means = weigh_windows(torch.cat([y, z, y * y, z * z, y * z])).split(len(x))
    squares = means[0].pow(2), means[1].pow(2)
    product = means[0] * means[1]
    variances = [(means[2 + i] - squares[i]).clamp(min=0.0) for i in (0, 1)]
    upper = 2 * (means[4] - product) + c2
    lower = variances[0] + variances[1] + c2
    similarity = ((2 * product + c1) * upper) / ((squares[0] + squares[1] + c1) * lower)
    contrast = (upper / lower)[..., border:-border, border:-border]
    return similarity.flatten(1).mean(1), contrast.flatten(1).mean(1)


def weigh_windows(images: Tensor) -> Tensor:
    """The mean of each window of images (n, C, H, W), with Gaussian weights, (n, C, H - 10, W - 10).

    All channels of all images are those of one: a processor computes many channels side by side, and three would leave most of
    its width unused.
    """
    kind: dict[str, Any] = {"dtype": images.dtype, "device": images.device}
    distances = torch.arange(SSIM_WINDOW, **kind) - SSIM_WINDOW // 2
    weights = torch.exp(-(distances / SSIM_SIGMA).pow(2) / 2)
    weights = (weights / weights.sum())[:, None]
    planes = images.flatten(0, 1)
    with without_autocast(images.device):  # variances are small differences of large numbers
        window = (weights @ weights.t()).expand(len(planes), 1, -1, -1)
        means = F.conv2d(planes[None], window, groups=len(planes))[0]
    return means.view(*images.shape[:2], *means.shape[1:])


class ImageSSIM(StructuralSimilarityIndexMeasure):
    """The mean over images of each image's SSIM; exactly 1 for an image without error, NaN for images without room for a window.

    float32 rounds the variances of bright, even images: a white page would be 0.9992 similar to itself.
    """

    similarity: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__(data_range=float(WHITE))

    def update(self, preds: Tensor, target: Tensor, structure: Structure | None = None) -> None:
        """Both (B, C, H, W), 0 to WHITE; `structure` is theirs, if it is computed already."""
        if not has_room(preds):
            self.similarity = self.similarity + torch.nan
            return
        structure = structure or Structure.of(preds, target)
        self.similarity = self.similarity + (~structure.differ).sum()
        self.similarity += structure.similarity.sum()
        self.total = self.total + len(preds)


class ImageMSSSIM(MultiScaleStructuralSimilarityIndexMeasure):
    """The mean over images of each image's MS-SSIM on scales of these weights; exactly 1 for an image without error."""

    similarity: Tensor
    total: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(data_range=float(WHITE), betas=tuple(weights))

    def update(self, preds: Tensor, target: Tensor, structure: Structure | None = None) -> None:
        """Both (B, C, H, W), 0 to WHITE; `structure` is theirs, if it is computed already."""
        structure = structure or Structure.of(preds, target)
        self.similarity = self.similarity + (~structure.differ).sum()
        self.total = self.total + len(preds)
        if len(structure.x):
            self.similarity += self._combine_scales(structure).sum()

    def _combine_scales(self, structure: Structure) -> Tensor:
        """The MS-SSIM (n,) of the images that differ: contrasts at all scales, and the similarity at the last."""
        x_hat, x, similarity = structure.x_hat, structure.x, structure.similarity
        factors = [structure.contrast]
        for _ in self.betas[1:]:
            x_hat, x = F.avg_pool2d(x_hat, 2), F.avg_pool2d(x, 2)
            similarity, contrast = compare_windows(x_hat, x)
            factors.append(contrast)
        factors[-1] = similarity
        weights = torch.tensor(self.betas, device=x.device)[:, None]
        return torch.stack(factors).relu().pow(weights).prod(0)


def find_differing(x_hat: Tensor, x: Tensor) -> Tensor:
    """Which images (B, C, H, W) differ from their reconstructions, (B,) bool."""
    return (x_hat != x).flatten(1).any(1)


def select_images(rows: Tensor, *images: Tensor) -> list[Tensor]:
    """These rows of images (B, C, H, W); the tensors themselves if it is all, in their own memory format."""
    return [each if rows.all() else each[rows] for each in images]


class Sharpness(Metric):
    """Gradient energy of the reconstructions relative to that of their images: 1 is equally sharp, 0 is flat.

    The energy is the sum of squared differences between neighbouring pixels, to the right and below, over the whole set.
    Noise has energy too: with a poor PSNR, a ratio near 1 doesn't show that the edges are in the right places. It is NaN
    if no image has any, as blank ones don't.
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
        ratio = self.reconstructed / self.real
        return torch.where(self.real > 0, ratio, torch.nan).float()


def gradient_energy(x: Tensor) -> Tensor:
    """The sum of squared forward differences of images (B, C, H, W), float64."""
    return sum(
        (x.diff(dim=dim).square().sum(dtype=torch.float64) for dim in (2, 3)),
        torch.zeros((), device=x.device),
    )


class Reconstruction(MetricCollection):
    """PSNR in dB and SSIM, both means over images of the value of each image, and the sharpness of all images together.

    All are computed on whole pixels of the images' depth, as a file would hold them, and are NaN if a reconstruction is. They
    refer to the whole range of the pixels, channel by channel. The PSNR of the pooled error of all images is lower, by about
    0.5 dB on photographs: don't compare the two.
    """

    def __init__(self) -> None:
        psnr = ImagePSNR()
        ssim = ImageSSIM()
        # Without compute_groups=False, a perfect first batch would merge metrics whose states are equal by chance.
        super().__init__(
            {"psnr": psnr, "ssim": ssim, "sharpness": Sharpness()}, compute_groups=False
        )

    def update(self, x: Tensor, x_hat: Tensor, depth: int) -> None:  # type: ignore[override]
        """Both (B, C, H, W) in [-1, 1]; `depth` is the bits of a channel of their pixels, 8 or 16."""
        # Whole numbers have no NaN: it would become black, which has a PSNR.
        pixels = to_levels(x_hat, depth).masked_fill(x_hat.isnan(), torch.nan)
        levels = to_levels(x, depth)
        structure = Structure.of(pixels, levels)
        super().update(pixels, levels, step=pixel_step(depth), structure=structure)


def pixel_step(depth: int) -> float:
    """What two neighbouring pixels of this many bits differ by, where the highest is WHITE."""
    return WHITE / (2**depth - 1)


def to_levels(x: Tensor, depth: int) -> Tensor:
    """Images in [-1, 1] -> 0 to WHITE, rounded to pixels of this many bits: float32, or float64 of more than 8.

    The squares and the variances of 16 bits are more than float32 can hold.
    """
    pixels = to_depth(x, depth)
    return pixels.float() if depth == 8 else pixels.double() * pixel_step(depth)


class PixelError(Metric):
    """The mean over all pixels and images of |x_hat - x|^power, with pixels scaled to [0, 1]."""

    full_state_update = False
    total: Tensor
    n: Tensor

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Both (B, C, H, W), 0 to WHITE."""
        self.total += ((x_hat - x).abs() / WHITE).pow(self.power).sum(dtype=torch.float64)
        self.n += x.numel()

    def compute(self) -> Tensor:
        return (self.total / self.n).float()


class Fidelity(Reconstruction):
    """All scores of Reconstruction, l1 and l2 of pixels in [0, 1], and MS-SSIM, the mean over images (Wang et al. 2003).

    MS-SSIM uses as many of its five scales as images of `image_size` pixels have room for, with weights normalized to a sum
    of 1. `scales` is their number; with 0 there is no MS-SSIM.
    """

    def __init__(self, image_size: SizeSetting) -> None:
        super().__init__()
        self.scales = count_scales(min(check_size("data.image_size", image_size, "pixel")))
        self.add_metrics({"l1": PixelError(1), "l2": PixelError(2)})
        if self.scales:
            weights = SCALE_WEIGHTS[: self.scales]
            betas = tuple(weight / sum(weights) for weight in weights)
            self.add_metrics({"ms_ssim": ImageMSSSIM(betas)})


def count_scales(side: int) -> int:
    """The number of scales of images of this shorter side, each half as large as the one before, that hold a whole window.

    torchmetrics asks for a little more room than that.
    """
    fits = [
        n
        for n in range(1, len(SCALE_WEIGHTS) + 1)
        if side >= max(SSIM_WINDOW * 2 ** (n - 1), SSIM_WINDOW * (n - 1) ** 2)
    ]
    return max(fits, default=0)
