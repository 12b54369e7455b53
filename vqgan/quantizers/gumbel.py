"""Codes drawn from a categorical distribution that the encoder predicts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import broadcast
from engine.errors import check_range
from vqgan.quantizers.base import Anneal, Quantized, Quantizer, flatten, float32, nearest, unflatten
from vqgan.quantizers.codebook import softly
from vqgan.quantizers.kmeans import kmeans as lloyd


class Gumbel(Quantizer):
    """Straight-through Gumbel-softmax (Jang et al. 2017, section 2.2; Ramesh et al. 2021, DALL-E, section 2.1).

    A linear map of z_e gives K logits. In training a code is drawn (the argmax of logits + Gumbel noise) and gets the
    gradient of the softmax at `temperature`, which falls by an `Anneal`; in evaluation the likeliest code is taken. The
    loss is `kl_weight` times KL(p || uniform) in nats, which keeps the choice open. `start` sets codes by k-means and
    the logits to the log-probabilities of a Gaussian around each.
    """

    K: int

    def __init__(
        self,
        K: int,
        dim: int = 64,
        temperature: float | Anneal = 1.0,
        kl_weight: float = 5e-4,
        kmeans: bool = True,
    ) -> None:
        super().__init__(K, dim)
        check_range("quantizer.kl_weight", kl_weight, 0)
        if not isinstance(temperature, Anneal):
            check_range("quantizer.temperature", temperature, 1e-6)
        self.temperature, self.kl_weight, self.kmeans = temperature, kl_weight, kmeans
        self.codebook, self.logits = nn.Parameter(torch.randn(K, dim)), nn.Linear(dim, K)

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        logits = self.logits(flatten(z_e))
        log_p = F.log_softmax(logits, 1)
        kl = (log_p.exp() * log_p).sum(1).mean() + math.log(self.K)
        temperature = (
            self.temperature(int(self.updates))
            if isinstance(self.temperature, Anneal)
            else self.temperature
        )
        if self.training:
            noisy = logits - torch.empty_like(logits).exponential_().log()
            indices = noisy.argmax(1)
            z_q = softly(torch.softmax(noisy / temperature, 1), indices, self.codebook)
        else:
            indices = logits.argmax(1)
            z_q = self.codebook[indices]
        terms = {"kl": kl.detach(), "temperature": torch.tensor(temperature)}
        indices = indices.view(z_e.shape[0], *z_e.shape[2:])
        return Quantized(z_e, unflatten(z_q, z_e), indices, self.kl_weight * kl, terms)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        if not self.kmeans:
            return
        centres = broadcast(lloyd(z.float(), self.K)[0])
        variance = broadcast((z - centres[nearest(z.float(), centres)]).square().mean()).clamp(
            min=1e-6
        )
        self.codebook.copy_(centres)
        self.logits.weight.copy_(centres / variance)
        self.logits.bias.copy_(-centres.square().sum(1) / (2 * variance))
