"""A continuous bottleneck: a Gaussian instead of a code."""

import torch
from torch import Tensor

from engine.errors import check_range
from vqgan.quantizers.base import Quantized, Standardised, float32

LOGVAR_AT_START = (
    -4.0
)  # of the standardised mean: a little noise, so that the start from patches stays what it is


class KL(Standardised):
    """Diagonal Gaussian posterior with reparameterisation (Kingma & Welling 2014, section 2.4 and appendix B).

    The encoder gives mean and log-variance, 2 * dim channels. In training z_q = mean + std * noise, in evaluation the
    mean. The loss is `weight` times KL(N(mean, std^2) || N(0, 1)) in nats a position, summed over its channels. Against
    a squared error averaged over n pixel values a position (192 for 8x8 RGB patches), weight = 2 s^2 / n is the evidence
    lower bound of a decoder with variance s^2.
    """

    def __init__(self, dim: int = 16, weight: float = 3e-4) -> None:
        super().__init__(None, dim, in_dim=2 * dim)
        check_range("quantizer.weight", weight, 0)
        self.weight = weight

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        mean, logvar = z_e.float().chunk(2, 1)
        mean, logvar = self.standard(mean), (logvar + LOGVAR_AT_START).clamp(-30, 20)
        kl = (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean() / 2
        z = mean + (logvar / 2).exp() * torch.randn_like(mean) if self.training else mean
        return Quantized(mean, self.original(z), None, self.weight * kl, {"kl": kl.detach()})

    def draw(self, n: int, grid: tuple[int, int], seed: int) -> Tensor:
        """z_q (n, dim, h, w) for z from N(0, 1)."""
        random = torch.Generator().manual_seed(seed)
        z = torch.stack([torch.randn(self.dim, *grid, generator=random) for _ in range(n)])
        return self.original(z.to(self.centre))
