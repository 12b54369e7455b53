"""Temperature, top-k and top-p as functions of logits, and the one decoding loop."""

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


@dataclass
class Sampler:
    """How codes are drawn from logits: divided by `temperature`, then the `top_k` (0: all), then `top_p` (1: all)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"sampler.temperature={self.temperature} must be above 0; sampler.top_k=1 takes the likeliest code")
        if self.top_k < 0:
            raise InputError(f"sampler.top_k={self.top_k} must be at least 0; 0 keeps all codes")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampler.top_p={self.top_p} must be above 0 and at most 1; 1 keeps all codes")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """logits (n, K) and numbers (n,) uniform in [0, 1) -> codes (n,), by the inverse of the distribution function."""
        logits = logits.float() / self.temperature
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        cumulated = logits.softmax(-1).double().cumsum(-1)
        target = uniform.double()[:, None] * cumulated[:, -1:]
        codes = torch.searchsorted(cumulated, target, right=True)[:, 0]
        last = logits.isfinite().long().cumsum(-1).argmax(-1)  # rounding must not lead past the last code that is left
        return torch.minimum(codes, last)


@torch.no_grad()
def sample(model: GPT, sampler: Sampler, n: int, seed: int, batch_size: int = 100, cached: bool = True) -> Tensor:
    """n grids of codes (n, h, w) int64 on the model's device.

    Sample i draws from row i of one table of random numbers, so that it is the same whatever the batch size.
    cached=False computes every position anew: slow, for comparison.
    """
    device = next(model.parameters()).device
    uniform = torch.rand(n, model.T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    training = model.training
    model.eval()
    grids = []
    for numbers in uniform.split(batch_size):
        codes = torch.zeros(len(numbers), model.T, dtype=torch.int64, device=device)
        cache = Cache()
        for t in range(model.T):
            if cached:
                logits = model.step(codes[:, t - 1] if t else None, len(numbers), t, cache)
            else:
                logits = model(codes)[:, t]
            codes[:, t] = sampler.draw(logits, numbers[:, t])
        grids.append(codes.view(-1, *model.grid))
    model.train(training)
    return torch.cat(grids)
