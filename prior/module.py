"""The training step of stage 2."""

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from prior.models.gpt import GPT
from vqgan.clock import Budget, Clocked, MakeOptimizer, Schedule


class Prior(Clocked):
    """A prior over code grids, trained by maximum likelihood (VQGAN, Esser et al. 2021, eq. 9) and judged in nats."""

    def __init__(self, model: GPT, optimizer: MakeOptimizer, budget: Budget, schedule: Schedule, **update: Any) -> None:
        super().__init__(budget, schedule, **update)
        self.model, self.make_optimizer = model, optimizer
        self.nats = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.descend(0, self.losses(batch[0]), self.schedule(self.now))
        self.tick()

    def losses(self, indices: Tensor) -> Iterator[Tensor]:
        """The loss of each micro-batch, times its share of the update."""
        for part, share in self.micro(indices):
            loss = self.nats_per_token(part)
            self.log_terms({"nats_per_token": loss})
            yield share * loss

    def nats_per_token(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) -> the mean of -log p(code | codes before), in nats."""
        codes = indices.flatten(1)
        return F.cross_entropy(self.model(codes).flatten(0, 1), codes.flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        indices = batch[0]
        self.nats.update(self.nats_per_token(indices), weight=len(indices))

    def on_validation_epoch_end(self) -> None:
        nats = self.nats.compute()
        self.log_dict({"val/nats_per_token": nats, "val/bits_per_image": nats * self.model.T / math.log(2)})
        self.nats.reset()

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.make_optimizer, self.model)
