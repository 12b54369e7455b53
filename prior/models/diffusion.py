"""Discrete diffusion: masked codes are filled in in random order."""

import torch
from torch import Tensor

from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import Prediction
from prior.models.masked import Masked, random_subset


class Diffusion(Masked):
    """Discrete diffusion with the mask as absorbing state (Austin et al. 2021, section 3.1).

    The network gets no time step, since the number of masked codes shows it: it is a model of codes in any order (Hoogeboom
    et al. 2022, section 3).
    """

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """The loss is the bound that `judge` estimates: m codes of a grid are masked, m = 1 ... L equally likely.

        The values of m are spread over a batch as evenly as possible, which lowers the variance of the gradient.
        """
        n = len(codes)
        offset = torch.randint(n * self.L, (1,), device=codes.device)
        spread = offset + self.L * torch.arange(n, device=codes.device)
        m = 1 + (spread // n % self.L)[:, None]
        masked = random_subset(torch.rand(codes.shape, device=codes.device), m)
        features = self.features(codes, masked, labels)
        return Prediction(features, codes, masked * self.L / m, self.readout)

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Codes are drawn in random order, an equal share in each step.

        With one step per code, the default, samples follow the distribution exactly (Hoogeboom et al. 2022, algorithm 1).
        """
        codes = codes.clone()
        masked = ~known.to(codes.device).repeat(len(codes), 1)
        unknown = (~known).nonzero()[:, 0].to(codes.device)
        chance, uniform = numbers.uniform(2, self.L).unbind(1)
        order = unknown[chance[:, unknown].argsort(1)]
        steps = min(sampler.steps or self.L, len(unknown))
        for places in order.tensor_split(max(steps, 1), 1):
            drawn, _ = self.propose(codes, masked, places, uniform, sampler, labels)
            codes.scatter_(1, places, drawn)
            masked.scatter_(1, places, False)
        return codes
