"""A causal transformer that learns many orders of the grid before it settles for raster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from prior.models.base import Prediction, predict_all
from prior.models.gpt import GPT
from prior.orders import shuffled


class RAR(GPT):
    """Randomized autoregressive modelling (Yu et al. 2024, section 3.2).

    In training each grid is shown in a random order with probability r, else in raster order. r is 1 until the share
    `random_until` of the run is over and falls evenly to 0 at `raster_from`; the prior is judged and drawn from in raster
    order. Where the order may be any, each step must be told the place that comes next (the paper's target-aware embedding)
    and that of the code it reads: GPT's place vectors and the angles of the queries say the one, `origin` and the angles of
    the keys the other.
    """

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        random_until: float = 0.5,
        raster_from: float = 0.75,
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
        shown = codes.gather(1, order)
        return predict_all(self(self.reread(shown), labels, order), shown)

    def randomness(self, progress: float) -> float:
        """The probability r of a random order."""
        return min(
            1.0, max(0.0, (self.raster_from - progress) / (self.raster_from - self.random_until))
        )

    def forward(
        self, codes: Tensor, labels: Tensor | None = None, order: Tensor | None = None
    ) -> Tensor:
        """codes (B, T) as they come in `order` (B, T), by default raster -> their logits (B, T, K) float32."""
        return self.predict(codes, labels, *self.places(order))

    def places(self, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Where the steps of `order` (..., T) go, by the vectors `place` and the queries' angles, and where what they read
        stands, by `origin` and the keys' angles."""
        order = torch.arange(self.T, device=self.place.device) if order is None else order
        to, read = order, order[..., :-1]  # the first step reads no code
        told = self.place[to] + F.pad(self.origin[read], (0, 0, 1, 0))
        return told, torch.cat(
            [self.angles[to], F.pad(self.angles[read], (0, 0, 0, 0, 0, 0, 1, 0))], -3
        )
