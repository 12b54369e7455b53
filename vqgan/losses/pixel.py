"""Distances between images, pixel by pixel and frequency by frequency."""

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_range


class Pixel(nn.Module):
    """l1 * mean |x - x_hat| + l2 * mean (x - x_hat)^2 + focal * the focal frequency loss; images in [-1, 1].

    Means are over all pixels of the batch. Raises InputError if a weight is negative or all are 0.
    """

    def __init__(self, l1: float, l2: float, focal: float) -> None:
        super().__init__()
        for name, value in (("l1", l1), ("l2", l2), ("focal", focal)):
            check_range(f"loss.pixel.{name}", value, 0)
        if not (l1 or l2 or focal):
            raise InputError(
                "loss.pixel has l1=0, l2=0 and focal=0, which is no loss; set one of them above 0, such as l2=1"
            )
        self.l1, self.l2, self.focal = l1, l2, focal

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Both (B, C, H, W) -> a scalar in float32."""
        difference = x_hat.float() - x.float()
        loss = self.l1 * difference.abs().mean() + self.l2 * difference.square().mean()
        return loss + self.focal * focal_frequency(difference) if self.focal else loss


def focal_frequency(difference: Tensor) -> Tensor:
    """Focal frequency loss (Jiang et al. 2021, eq. 8-9, alpha = 1) of x_hat - x, float32 (B, C, H, W) -> a scalar.

    The mean square of the orthonormal spectrum, with each frequency weighted by its own magnitude over the largest of its
    image and channel. The weight has no gradient. The loss is at most the mean square of the difference, and equal to it
    if the spectrum is flat.
    """
    spectrum = torch.fft.fft2(difference, norm="ortho")
    weight = spectrum.detach().abs()
    weight = weight / weight.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight * (spectrum.real.square() + spectrum.imag.square())).mean()
