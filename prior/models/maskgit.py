"""Masked modelling: few codes are drawn in the first steps and many in the last ones."""

import math

import torch
from torch import Tensor

from prior.models.base import Prediction
from prior.models.masked import Masked, random_subset

STEPS = 12  # the paper has 8 to 12 for 16 x 16 and 32 x 32 codes


class MaskGIT(Masked):
    """Masked modelling and parallel decoding (MaskGIT, Chang et al. 2022, section 3)."""

    own_order = "confidence"

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """The loss is the mean over all masked codes, a share cos(pi / 2 * u) of each grid, u uniform (eq. 1)."""
        share = torch.cos(math.pi / 2 * torch.rand(len(codes), 1, device=codes.device))
        uniform = torch.rand(codes.shape, device=codes.device)
        masked = random_subset(uniform, (share * self.L).ceil())
        weights = masked * (masked.numel() / masked.sum())
        features = self.features(codes, masked, labels)
        return Prediction(features, codes, weights, self.readout)

    def own_steps(self, total: int) -> int:
        return min(STEPS, total)

    def missing_after(self, step: int, steps: int, total: int) -> int:
        """A share cos(pi / 2 * t) of the codes is missing after a share t of the steps (section 3.2)."""
        return int(math.cos(math.pi / 2 * step / steps) * total)
