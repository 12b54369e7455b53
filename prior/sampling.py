"""Temperature, top-k, top-p and min-p as functions of logits, and the one decoding loop."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass
class Sampler:
    """How codes are drawn from logits: divided by `temperature`, then the `top_k` (0: all), then `top_p` (1: all), then
    `min_p` (0: all)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"sampler.temperature={self.temperature} must be above 0; sampler.top_k=1 takes the likeliest code")
        if self.top_k < 0:
            raise InputError(f"sampler.top_k={self.top_k} must be at least 0; 0 keeps all codes")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampler.top_p={self.top_p} must be above 0 and at most 1; 1 keeps all codes")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"sampler.min_p={self.min_p} must be from 0 to 1; 0 keeps all codes")

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


def sample(model: GPT, sampler: Sampler, n: int, seed: int, batch_size: int = 100, cached: bool = True) -> Tensor:
    """n grids of codes (n, h, w) int64 on the model's device: those of `batches` together. The model keeps its mode."""
    training = model.training
    codes = torch.cat(list(batches(model.eval(), sampler, n, seed, batch_size, cached)))
    model.train(training)
    return codes


@torch.no_grad()
def batches(model: GPT, sampler: Sampler, n: int, seed: int, batch_size: int = 100, cached: bool = True) -> Iterator[Tensor]:
    """n grids of codes, each batch (b, h, w) int64 on the device of the model, which is in eval mode, when it is drawn.

    Sample i draws from row i of one table of random numbers, so that it is the same whatever the batch size.
    cached=False computes every position anew: slow, for comparison.
    """
    device = next(model.parameters()).device
    uniform = torch.rand(n, model.T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    for numbers in uniform.split(batch_size):
        codes = torch.zeros(len(numbers), model.T, dtype=torch.int64, device=device)
        cache = Cache()
        for t in range(model.T):
            if cached:
                logits = model.step(codes[:, t - 1] if t else None, len(numbers), t, cache)
            else:
                logits = model(codes)[:, t]
            codes[:, t] = sampler.draw(logits, numbers[:, t])
        yield codes.view(-1, *model.grid)
