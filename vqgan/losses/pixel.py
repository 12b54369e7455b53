"""Distances between images, pixel by pixel."""

from torch import Tensor, nn


class Pixel(nn.Module):
    """l1 * mean |x - x_hat| + l2 * mean (x - x_hat)^2, over all pixels of the batch; images in [-1, 1]."""

    def __init__(self, l1: float = 0.0, l2: float = 1.0) -> None:
        super().__init__()
        self.l1, self.l2 = l1, l2

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        difference = x_hat.float() - x.float()
        return self.l1 * difference.abs().mean() + self.l2 * difference.square().mean()
