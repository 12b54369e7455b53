"""The training step of stage 2."""

import math

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from prior.models.gpt import GPT
from vqgan.clock import Budget, Clocked, MakeOptimizer, Schedule


class Prior(Clocked):
    """A prior over code grids, trained by maximum likelihood (VQGAN, Esser et al. 2021, eq. 9) and judged in nats."""

    def __init__(self, model: GPT, optimizer: MakeOptimizer, budget: Budget, schedule: Schedule, clip: float = 1.0) -> None:
        super().__init__(budget, schedule, clip)
        self.model, self.make_optimizer = model, optimizer
        self.nats = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        loss = self.nats_per_token(batch[0])
        self.descend(0, loss, self.schedule(self.now))
        self.log_terms({"nats_per_token": loss})
        self.tick()

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
