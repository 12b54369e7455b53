"""Discrete diffusion: as many codes are drawn in each step, by default one."""

import torch
from torch import Tensor

from prior.models.base import Prediction
from prior.models.masked import Masked, random_subset


class Diffusion(Masked):
    """Discrete diffusion with the mask as absorbing state (Austin et al. 2021, section 3.1).

    The network gets no time step, since the number of masked codes shows it: it is a model of codes in any order (Hoogeboom
    et al. 2022, section 3).
    """

    own_order = "random"

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

    def own_steps(self, total: int) -> int:
        """Code by code, in random order, samples follow the distribution exactly (Hoogeboom et al. 2022, algorithm 1)."""
        return total

    def missing_after(self, step: int, steps: int, total: int) -> int:
        """Each step draws an equal share."""
        if steps > total:
            return total - total * step // steps
        share, rest = divmod(total, steps)  # the first steps draw one more
        return total - share * step - min(step, rest)
