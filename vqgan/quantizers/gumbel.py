"""Codes sampled from a categorical distribution that depends on the encoder output."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.collectives import broadcast
from codegrid.engine.errors import check_range
from vqgan.quantizers.anneal import Anneal
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.gradients import soft_lookup
from vqgan.quantizers.kmeans import kmeans as run_kmeans
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import flatten, nearest, unflatten


class Gumbel(Quantizer):
    """Straight-through Gumbel-softmax (Jang et al. 2017, section 2.2; Ramesh et al. 2021, DALL-E, section 2.1).

    A linear map of z_e gives K logits. In training, the code is the argmax of logits + Gumbel noise, and its gradient
    is that of the softmax at `temperature`, a constant or an `Anneal`. In evaluation, it is the most likely code. The
    loss is `kl_weight` times KL(p || uniform) in nats, which keeps the choice open. With `kmeans`, `initialise` sets
    the codes by k-means and the logits to the log-probabilities of a Gaussian around each code.
    """

    training_settings = ("temperature", "kl_weight", "kmeans")
    K: int

    def __init__(
        self,
        K: int,
        dim: int,
        temperature: float | Anneal,
        kl_weight: float,
        kmeans: bool,
        **when: Any,
    ) -> None:
        super().__init__(K, dim, **when)
        check_range("quantizer.kl_weight", kl_weight, 0)
        if not isinstance(temperature, Anneal):
            check_range("quantizer.temperature", temperature, 1e-6)
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.kmeans = kmeans
        self.codebook = nn.Parameter(torch.randn(K, dim))
        self.logits = nn.Linear(dim, K)

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        logits = self.logits(flatten(z_e))
        log_p = F.log_softmax(logits, 1)
        kl = (log_p.exp() * log_p).sum(1).mean() + math.log(self.K)
        temperature = self.current_temperature()
        if self.training:
            noisy = logits - torch.empty_like(logits).exponential_().log()
            indices = noisy.argmax(1)
            z_q = soft_lookup(torch.softmax(noisy / temperature, 1), indices, self.codebook)
        else:
            indices = logits.argmax(1)
            z_q = self.codebook[indices]
        terms = {"kl": kl.detach(), "temperature": torch.full_like(kl.detach(), temperature)}
        grid = indices.view(z_e.shape[0], *z_e.shape[2:])
        return Quantized(z_e, unflatten(z_q, z_e), grid, self.kl_weight * kl, terms)

    def current_temperature(self) -> float:
        if isinstance(self.temperature, Anneal):
            return self.temperature(self.num_updates)
        return self.temperature

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        if not self.kmeans:
            return
        z = z.float()
        centres = broadcast(run_kmeans(z, self.K)[0])
        variance = (z - centres[nearest(z, centres)]).square().mean()
        variance = broadcast(variance).clamp(min=1e-6)
        self.codebook.copy_(centres)
        self.logits.weight.copy_(centres / variance)
        self.logits.bias.copy_(-centres.square().sum(1) / (2 * variance))
