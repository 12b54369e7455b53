"""The training step of stage 2."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from prior.models.base import Model, Prediction
from vqgan.clock import Budget, Clocked, MakeOptimizer, Schedule
from vqgan.quantizers.base import between


class Prior(Clocked):
    """A prior over code grids, trained by maximum likelihood (VQGAN, Esser et al. 2021, eq. 9) and judged in nats.

    Of a model with classes, in training a share `label_drop` of the labels is withheld, so that it learns the codes of no
    class in particular too, which guidance needs (Ho & Salimans 2022, algorithm 1).
    """

    def __init__(
        self,
        model: Model,
        optimizer: MakeOptimizer,
        budget: Budget,
        schedule: Schedule,
        label_drop: float = 0.1,
        label_smoothing: float = 0.0,
        **update: Any,
    ) -> None:
        super().__init__(budget, schedule, **update)
        between("label_drop", label_drop, 0, 1)
        between("label_smoothing", label_smoothing, 0, 1)
        self.model, self.make_optimizer = model, optimizer
        self.label_drop, self.label_smoothing = label_drop, label_smoothing
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
            prediction = self.model.learn(part.flatten(1), told if self.model.classes else None, self.now.progress)
            self.log_terms({"loss": mean(nats(prediction), prediction)})
            yield share * mean(nats(prediction, self.label_smoothing), prediction)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        indices, labels = batch
        prediction = self.model.judge(indices.flatten(1), labels if self.model.classes else None)
        self.nats.update(mean(nats(prediction), prediction), weight=len(indices))

    def on_validation_epoch_end(self) -> None:
        found = self.nats.compute()
        self.log_dict({"val/nats_per_token": found, "val/bits_per_image": found * self.model.L / math.log(2)})
        self.nats.reset()

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.make_optimizer, self.model)


def nats(prediction: Prediction, smoothing: float = 0.0) -> Tensor:
    """-log p of each target (B, L); with `smoothing` that share of it is of any code (Szegedy et al. 2016, section 7)."""
    logits, targets = prediction.logits.flatten(0, 1).float(), prediction.targets.flatten()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing).view_as(prediction.targets)


def mean(found: Tensor, prediction: Prediction) -> Tensor:
    """The mean (scalar) of what was found for each code (B, L), by what counts."""
    return (found * prediction.weights).mean()
