"""A continuous bottleneck: a Gaussian instead of a code."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from codegrid.engine.errors import check_range
from vqgan.quantizers.base import Quantized, Standardised
from vqgan.quantizers.precision import float32

# Added to the log-variance of the standardised mean. Noise is small at first, so that a tokenizer initialised from
# patches keeps its quality.
LOGVAR_OFFSET = -4.0


class KL(Standardised):
    """Diagonal Gaussian posterior with reparameterisation (Kingma & Welling 2014, section 2.4 and appendix B).

    The encoder gives mean and log-variance in 2 * dim channels. z_q is mean + std * noise in training and the mean in
    evaluation. The loss is `weight` times KL(N(mean, std^2) || N(0, 1)) in nats per position, summed over channels.
    Relative to a squared error averaged over n pixel values per position (192 for 8x8 RGB patches), weight = 2 s^2 / n
    is the evidence lower bound of a decoder with variance s^2.
    """

    training_settings = ("weight",)

    def __init__(self, dim: int, weight: float) -> None:
        super().__init__(None, dim, in_dim=2 * dim)
        check_range("quantizer.weight", weight, 0)
        self.weight = weight

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        mean, logvar = z_e.float().chunk(2, 1)
        mean = self.standardise(mean)
        logvar = (logvar + LOGVAR_OFFSET).clamp(-30, 20)
        kl = (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean() / 2
        z = mean + (logvar / 2).exp() * torch.randn_like(mean) if self.training else mean
        return Quantized(mean, self.unstandardise(z), None, self.weight * kl, {"kl": kl.detach()})

    def sample_latents(
        self, n: int, grid: tuple[int, int], seed: int, batch_size: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Batches of z_q (b, dim, *grid) from N(0, 1), at the encoder's scale."""
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.randn(self.dim, *grid, generator=generator) for _ in range(n))
        samples = islice(noise, start, None)
        while batch := list(islice(samples, batch_size)):
            yield self.unstandardise(torch.stack(batch).to(self.centre))
