"""Masked codes, the surest first."""

import math

import torch
from torch import Tensor

from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import Prediction
from prior.models.masked import Masked, random_subset

STEPS = 12  # the paper has 8 to 12 for 16 x 16 and 32 x 32 codes


class MaskGIT(Masked):
    """Masked modelling and parallel decoding (MaskGIT, Chang et al. 2022, section 3)."""

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """The mean over all codes that are masked, a share cos(pi / 2 * u) of each grid, u uniform (eq. 1)."""
        share = torch.cos(math.pi / 2 * torch.rand(len(codes), 1, device=codes.device))
        masked = random_subset(
            torch.rand(codes.shape, device=codes.device), (share * self.L).ceil()
        )
        return Prediction(
            self(codes, masked, labels), codes, masked * (masked.numel() / masked.sum())
        )

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
    ) -> Tensor:
        """In each step all codes that are missing are drawn, and the surest kept (section 3.2); after a share t of the
        steps a share cos(pi / 2 * t) of them is missing."""
        unknown = (~known).nonzero()[:, 0].to(codes.device)
        codes, masked, places = (
            codes.clone(),
            ~known.to(codes.device).repeat(len(codes), 1),
            unknown.repeat(len(codes), 1),
        )
        steps = min(sampler.steps or STEPS, len(unknown))
        for step in range(1, steps + 1):
            uniform, luck = numbers.uniform(2, self.L).unbind(1)
            drawn, logits = self.propose(codes, masked, places, uniform, sampler, labels)
            sure = (
                (logits / sampler.temperature).log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            )
            gumbel = -luck.gather(1, places).clamp(min=1e-300).log().neg().log()
            order = (sure + sampler.choice_temperature * (1 - step / steps) * gumbel).argsort(
                1, descending=True
            )
            missing = min(
                int(math.cos(math.pi / 2 * step / steps) * len(unknown)), places.shape[1] - 1
            )
            kept, rest = order.tensor_split([places.shape[1] - missing], 1)
            codes.scatter_(1, places.gather(1, kept), drawn.gather(1, kept))
            masked.scatter_(1, places.gather(1, kept), False)
            places = places.gather(1, rest)
        return codes
