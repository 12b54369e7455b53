"""The training step of stage 2."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from prior.models.gpt import GPT
from vqgan.clock import Budget, Clocked, MakeOptimizer, Schedule
from vqgan.quantizers.base import between


class Prior(Clocked):
    """A prior over code grids, trained by maximum likelihood (VQGAN, Esser et al. 2021, eq. 9) and judged in nats.

    Of a model with classes, in training a share `label_drop` of the labels is withheld, so that it learns the codes of no
    class in particular too, which guidance needs (Ho & Salimans 2022, algorithm 1).
    """

    def __init__(
        self,
        model: GPT,
        optimizer: MakeOptimizer,
        budget: Budget,
        schedule: Schedule,
        label_drop: float = 0.1,
        **update: Any,
    ) -> None:
        super().__init__(budget, schedule, **update)
        between("label_drop", label_drop, 0, 1)
        self.model, self.make_optimizer, self.label_drop = model, optimizer, label_drop
        self.nats = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        indices, labels = batch
        if self.model.classes:
            labels = labels.masked_fill(torch.rand(len(labels), device=labels.device) < self.label_drop, -1)
        self.descend(0, self.losses(indices, labels), self.schedule(self.now))
        self.tick()

    def losses(self, indices: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The loss of each micro-batch, times its share of the update."""
        for (part, share), told in zip(self.micro(indices), labels.tensor_split(self.accumulate), strict=True):
            loss = self.nats_per_token(part, told)
            self.log_terms({"nats_per_token": loss})
            yield share * loss

    def nats_per_token(self, indices: Tensor, labels: Tensor) -> Tensor:
        """indices (B, h, w), labels (B,) -> the mean of -log p(code | codes before), in nats; of a model with classes
        -log p(code | label, codes before)."""
        codes = indices.flatten(1)
        logits = self.model(codes, labels if self.model.classes else None)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.nats.update(self.nats_per_token(*batch), weight=len(batch[0]))

    def on_validation_epoch_end(self) -> None:
        nats = self.nats.compute()
        self.log_dict({"val/nats_per_token": nats, "val/bits_per_image": nats * self.model.T / math.log(2)})
        self.nats.reset()

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.make_optimizer, self.model)
