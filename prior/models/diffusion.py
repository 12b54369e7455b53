"""Masked codes in random order."""

import torch
from torch import Tensor

from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import Prediction
from prior.models.masked import Masked, random_subset


class Diffusion(Masked):
    """Discrete diffusion with the mask as absorbing state (Austin et al. 2021, section 3.1), not told the time, which the
    number of masked codes shows: a model of codes in any order (Hoogeboom et al. 2022, section 3)."""

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """The bound that it is judged by: m codes of a grid are masked, 1 to L with equal probability, but spread over a
        batch as evenly as can be, which makes the gradient less random."""
        n = len(codes)
        spread = torch.randint(n * self.L, (1,), device=codes.device) + self.L * torch.arange(
            n, device=codes.device
        )
        m = 1 + (spread // n % self.L)[:, None]
        masked = random_subset(torch.rand(codes.shape, device=codes.device), m)
        return Prediction(self(codes, masked, labels), codes, masked * self.L / m)

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
    ) -> Tensor:
        """In random order, an equal share in each step; code by code, the default, samples follow the distribution itself
        (Hoogeboom et al. 2022, algorithm 1)."""
        unknown = (~known).nonzero()[:, 0].to(codes.device)
        chance, uniform = numbers.uniform(2, self.L).unbind(1)
        order = unknown[chance[:, unknown].argsort(1)]
        codes, masked = codes.clone(), ~known.to(codes.device).repeat(len(codes), 1)
        steps = min(sampler.steps or self.L, len(unknown))
        for places in order.tensor_split(max(steps, 1), 1):
            drawn, _ = self.propose(codes, masked, places, uniform, sampler, labels)
            codes.scatter_(1, places, drawn)
            masked.scatter_(1, places, False)
        return codes
