"""Masked modelling: many codes are drawn in one step, and the most confident ones stay."""

import math

import torch
from torch import Tensor

from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import Prediction
from prior.models.masked import Masked, random_subset

STEPS = 12  # the paper has 8 to 12 for 16 x 16 and 32 x 32 codes


class MaskGIT(Masked):
    """Masked modelling and parallel decoding (MaskGIT, Chang et al. 2022, section 3)."""

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """The loss is the mean over all masked codes, a share cos(pi / 2 * u) of each grid, u uniform (eq. 1)."""
        share = torch.cos(math.pi / 2 * torch.rand(len(codes), 1, device=codes.device))
        uniform = torch.rand(codes.shape, device=codes.device)
        masked = random_subset(uniform, (share * self.L).ceil())
        weights = masked * (masked.numel() / masked.sum())
        features = self.features(codes, masked, labels)
        return Prediction(features, codes, weights, self.readout)

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Each step draws all missing codes and accepts the most confident ones (section 3.2).

        After a share t of the steps, a share cos(pi / 2 * t) of the codes is missing.
        """
        codes = codes.clone()
        masked = ~known.to(codes.device).repeat(len(codes), 1)
        unknown = (~known).nonzero()[:, 0].to(codes.device)
        places = unknown.repeat(len(codes), 1)  # of the codes that are still missing
        steps = min(sampler.steps or STEPS, len(unknown))
        for step in range(1, steps + 1):
            uniform, luck = numbers.uniform(2, self.L).unbind(1)
            drawn, confidence = self.propose(codes, masked, places, uniform, sampler, labels)
            gumbel = -luck.gather(1, places).clamp(min=1e-300).log().neg().log()
            weight = sampler.choice_temperature * (1 - step / steps)
            order = (confidence + weight * gumbel).argsort(1, descending=True)
            scheduled = int(math.cos(math.pi / 2 * step / steps) * len(unknown))
            missing = min(scheduled, places.shape[1] - 1)  # every step accepts at least one
            accepted, rest = order.tensor_split([places.shape[1] - missing], 1)
            codes.scatter_(1, places.gather(1, accepted), drawn.gather(1, accepted))
            masked.scatter_(1, places.gather(1, accepted), False)
            places = places.gather(1, rest)
        return codes
