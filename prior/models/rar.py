"""A causal transformer that learns many orders of the grid before it settles on raster order."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from prior.models.base import Prediction, predict_all
from prior.models.gpt import GPT
from prior.orders import shuffled


class RAR(GPT):
    """Randomized autoregressive modelling (Yu et al. 2024, section 3.2).

    In training, each grid is shown in a random order with probability r, otherwise in raster order. r is 1 up to the share
    `random_until` of the run and falls linearly to 0 at `raster_from`; validation and sampling use raster order.

    In an arbitrary order each step must know the position of the code that it predicts (the paper's target-aware
    embedding) and that of the code it reads. GPT's position vectors and the angles of the queries give the former,
    `origin` and the angles of the keys the latter.
    """

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        *,
        random_until: float,
        raster_from: float,
        **gpt: Any,
    ) -> None:
        super().__init__(codebook, grid, classes, **gpt)
        if not 0 <= random_until < raster_from <= 1:
            raise InputError(
                f"prior.random_until={random_until} and prior.raster_from={raster_from} must be shares of the run, 0 to 1, the "
                "first below the second; use prior=gpt for raster order throughout"
            )
        self.random_until, self.raster_from = random_until, raster_from
        self.origin = nn.Parameter(torch.randn_like(self.place) * 0.02)

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        order = shuffled(len(codes), self.T, self.randomness(progress), codes.device)
        ordered = codes.gather(1, order)
        features = self.features(self.replace_codes(ordered), labels, order)
        return predict_all(features, ordered, self.readout)

    def randomness(self, progress: float) -> float:
        """The probability r of a random order, at `progress` in [0, 1] of the run."""
        r = (self.raster_from - progress) / (self.raster_from - self.random_until)
        return min(1.0, max(0.0, r))

    def forward(
        self, codes: Tensor, labels: Tensor | None = None, order: Tensor | None = None
    ) -> Tensor:
        """codes (B, T), arranged in `order` (B, T), by default raster -> their logits (B, T, K) float32."""
        return self.head.logits(self.features(codes, labels, order))

    def features(
        self, codes: Tensor, labels: Tensor | None = None, order: Tensor | None = None
    ) -> Tensor:
        return self.run_blocks(codes, labels, *self.places(order))

    def places(self, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors (..., T, width) and angles for the steps of `order` (..., T).

        The position that a step predicts enters by `place` and the angles of its query, the position of the code that it
        reads by `origin` and the angles of its key.
        """
        order = torch.arange(self.T, device=self.place.device) if order is None else order
        target = order
        source = order[..., :-1]  # the first step reads no code
        vectors = self.place[target] + F.pad(self.origin[source], (0, 0, 1, 0))
        keys = F.pad(self.angles[source], (0, 0, 0, 0, 0, 0, 1, 0))
        return vectors, torch.cat([self.angles[target], keys], -3)
