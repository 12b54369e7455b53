"""Temperature, top-k, top-p and min-p as functions of logits, and the one decoding loop."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from prior.models.gpt import GPT
from prior.models.transformer import Cache


def top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k largest of logits (..., K) keep their value, the others get -inf."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Only the most likely codes, as few as have probability p together, keep their value (Holtzman et al. 2020)."""
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= p  # what stands before a code suffices already
    return logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Only codes at least `share` times as likely as the likeliest keep their value (Nguyen et al. 2024, section 3)."""
    least = logits.amax(-1, keepdim=True) + math.log(share)
    return logits.masked_fill(logits < least, -torch.inf)


def guided(given: Tensor, free: Tensor, scale: float) -> Tensor:
    """Logits away from those without a label: free + scale * (given - free) (Ho & Salimans 2022, eq. 6, whose w is scale - 1)."""
    return free + scale * (given - free)


@dataclass
class Sampler:
    """How codes are drawn from logits: divided by `temperature`, then the `top_k` (0: all), then `top_p` (1: all), then
    `min_p` (0: all).

    Given labels, `guidance` moves the logits before all that: 1 not at all, 0 to those without a label. With
    `guidance_power` above 0 it grows from 1 over the grid, as that power of the share of the positions that is drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0
    guidance_power: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"sampler.temperature={self.temperature} must be above 0; sampler.top_k=1 takes the likeliest code")
        if self.top_k < 0:
            raise InputError(f"sampler.top_k={self.top_k} must be at least 0; 0 keeps all codes")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampler.top_p={self.top_p} must be above 0 and at most 1; 1 keeps all codes")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"sampler.min_p={self.min_p} must be from 0 to 1; 0 keeps all codes")
        if self.guidance < 0 or self.guidance_power < 0:
            raise InputError(
                f"sampler.guidance={self.guidance} and sampler.guidance_power={self.guidance_power} must be at least 0; "
                "guidance=1 draws without it"
            )

    def scale(self, drawn: float) -> float:
        """The strength of the guidance when the share `drawn` of the positions is."""
        return 1 + (self.guidance - 1) * drawn**self.guidance_power

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """logits (n, K) and numbers (n,) uniform in [0, 1) -> codes (n,), by the inverse of the distribution function."""
        logits = logits.float() / self.temperature
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p:
            logits = min_p(logits, self.min_p)
        cumulated = logits.softmax(-1).double().cumsum(-1)
        target = uniform.double()[:, None] * cumulated[:, -1:]
        codes = torch.searchsorted(cumulated, target, right=True)[:, 0]
        last = logits.isfinite().long().cumsum(-1).argmax(-1)  # rounding must not lead past the last code that is left
        return torch.minimum(codes, last)


def sample(model: GPT, sampler: Sampler, n: int, seed: int, **how: Any) -> Tensor:
    """n grids of codes (n, h, w) int64 on the model's device: those of `batches` together. The model keeps its mode."""
    training = model.training
    codes = torch.cat(list(batches(model.eval(), sampler, n, seed, **how)))
    model.train(training)
    return codes


@torch.no_grad()
def batches(
    model: GPT,
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int = 100,
    cached: bool = True,
    labels: Tensor | None = None,
) -> Iterator[Tensor]:
    """n grids of codes, each batch (b, h, w) int64 on the device of the model, which is in eval mode, when it is drawn.

    Sample i draws from row i of one table of random numbers, so that it is the same whatever the batch size; of a prior
    with classes it is of the class labels[i]. cached=False computes every position anew: slow, for comparison.
    """
    device = next(model.parameters()).device
    uniform = torch.rand(n, model.T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    told = None if labels is None else labels.to(device)
    guide = told is not None and sampler.guidance != 1
    for first in range(0, n, batch_size):
        numbers = uniform[first : first + batch_size]
        given = None if told is None else told[first : first + batch_size]
        if guide and given is not None:
            given = torch.cat([given, torch.full_like(given, -1)])  # each sample twice: with its label and without
        codes = torch.zeros(len(numbers), model.T, dtype=torch.int64, device=device)
        cache = Cache()
        for t in range(model.T):
            before = torch.cat([codes, codes]) if guide else codes
            if cached:
                logits = model.step(before[:, t - 1] if t else None, len(before), t, cache, given)
            else:
                logits = model(before, given)[:, t]
            if guide:
                with_label, without = logits.chunk(2)
                logits = guided(with_label, without, sampler.scale(t / model.T))
            codes[:, t] = sampler.draw(logits, numbers[:, t])
        yield codes.view(-1, *model.grid)
