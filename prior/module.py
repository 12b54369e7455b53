"""The training step of stage 2."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from data.loading import BatchDataModule
from engine.clock import Budget, Schedule
from engine.errors import check_range
from engine.fsdp import ShardedStrategy, reshard, unshard
from engine.module import ClockedModule, MakeOptimizer
from prior.models.base import Prediction, PriorModel
from prior.models.transformer import Block

MAX_TRAINING_GRIDS = 1_000  # training grids that a validation judges too


class Prior(ClockedModule):
    """A prior over code grids, trained by maximum likelihood (VQGAN, Esser et al. 2021, eq. 9) and judged in nats.

    Of a model with classes, in training a share `label_drop` of the labels is withheld, so that it learns the codes of no
    class in particular too, which guidance needs (Ho & Salimans 2022, algorithm 1).

    A validation judges the whole validation set and, for the gap between the two, some of the training set in the same way.
    """

    loss_map: Tensor  # (h, w) nats per token of each position, in the last validation

    def __init__(
        self,
        model: PriorModel,
        optimizer: MakeOptimizer,
        budget: Budget,
        schedule: Schedule,
        label_drop: float = 0.1,
        label_smoothing: float = 0.0,
        **update: Any,
    ) -> None:
        super().__init__(budget, schedule, **update)
        check_range("label_drop", label_drop, 0, 1)
        check_range("label_smoothing", label_smoothing, 0, 1)
        self.model, self.make_optimizer = model, optimizer
        self.label_drop, self.label_smoothing = label_drop, label_smoothing
        self.unseen, self.seen = LikelihoodMetric(model.L), LikelihoodMetric(model.L)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self.model, self.blocks)

    @property
    def blocks(self) -> list[Block]:
        """The model's transformer blocks, where it has any."""
        return [part for part in self.model.modules() if isinstance(part, Block)]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        indices, labels = batch
        if self.model.classes:
            labels = labels.masked_fill(
                torch.rand(len(labels), device=labels.device) < self.label_drop, -1
            )
        self.descend(0, self.losses(indices, labels), self.schedule(self.now))
        self.tick()

    def losses(self, indices: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The loss of each micro-batch, times its share of the update."""
        for (part, share), told in zip(
            self.micro_batches(indices), labels.tensor_split(self.accumulate), strict=True
        ):
            prediction = self.model.learn(
                part.flatten(1), told if self.model.classes else None, self.now.progress
            )
            loss = weighted_mean(negative_log_likelihood(prediction), prediction)
            self.log_terms({"loss": loss})
            yield share * (
                weighted_mean(negative_log_likelihood(prediction, self.label_smoothing), prediction)
                if self.label_smoothing
                else loss
            )

    @property
    def learned(self) -> PriorModel:
        return self.model

    def on_validation_epoch_start(self) -> None:
        unshard(
            self.model
        )  # ranks may have more batches to judge than others, and the first one draws samples alone

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.unseen.update(self.judge(*batch))

    def judge(self, indices: Tensor, labels: Tensor) -> Prediction:
        return self.model.judge(indices.flatten(1), labels if self.model.classes else None)

    def judge_training(self) -> None:
        """As many training grids as there are validation grids, at most 1,000 and always the same; this rank's share."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, BatchDataModule)
        grids, labels = data.take_evenly("train", min(data.size("val"), MAX_TRAINING_GRIDS))
        mine = slice(self.global_rank, None, self.trainer.world_size)
        for batch in zip(
            grids[mine].split(data.batch_size), labels[mine].split(data.batch_size), strict=True
        ):
            with (
                self.trainer.precision_plugin.val_step_context()
            ):  # as Lightning does in a validation step
                self.seen.update(self.judge(*(part.to(self.device).long() for part in batch)))

    def on_validation_epoch_end(self) -> None:
        self.judge_training()
        reshard(self.model)
        found, seen = self.unseen.compute(), self.seen.compute()
        nats_per_token = found["nats"].mean()
        self.loss_map = found["nats"].view(*self.model.grid, self.model.num_codebooks).mean(2)
        figures = {
            "nats_per_token": nats_per_token,
            "bits_per_image": nats_per_token * self.model.L / math.log(2),
            "top1": found["top1"],
            "top5": found["top5"],
            "gap": nats_per_token - seen["nats"].mean(),
            "nats_easiest_place": self.loss_map.min(),
            "nats_hardest_place": self.loss_map.max(),
        }
        self.log_dict({f"val/{name}": value.float() for name, value in figures.items()})
        self.unseen.reset()
        self.seen.reset()

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.make_optimizer, self.model, decayed=decayed_weights(self.model))


class LikelihoodMetric(Metric):
    """What a prior is worth on all grids of all ranks, each of which counts alike.

    nats (L,): of each code's position; top1, top5: the share of the codes to tell that are the likeliest, or among the five
    likeliest. Of codes that are equally likely the order is as good as drawn, so that a prior that knows nothing has k / K.
    """

    full_state_update = False
    nats: Tensor
    hits: Tensor
    told: Tensor
    grids: Tensor

    def __init__(self, L: int) -> None:
        super().__init__()
        for name, shape in (("nats", (L,)), ("hits", (2,)), ("told", ()), ("grids", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Prediction) -> None:
        target = prediction.logits.gather(-1, prediction.targets[..., None])
        above, alike = (prediction.logits > target).sum(-1), (prediction.logits == target).sum(-1)
        told = prediction.weights > 0
        for n, k in enumerate((1, 5)):
            self.hits[n] += ((k - above) / alike).clamp(0, 1)[told].sum(dtype=torch.float64)
        self.told += told.sum()
        self.nats += (negative_log_likelihood(prediction) * prediction.weights).sum(
            0, dtype=torch.float64
        )
        self.grids += len(told)

    def compute(self) -> dict[str, Tensor]:
        return {
            "nats": self.nats / self.grids,
            "top1": self.hits[0] / self.told,
            "top5": self.hits[1] / self.told,
        }


def decayed_weights(module: nn.Module) -> set[nn.Parameter]:
    """The weights of linear maps, convolutions and recurrences, which weight decay is for: norms, biases, and the vectors of
    codes, labels and places are not the better for being small."""
    return {
        p
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for name, p in part.named_parameters(recurse=False)
        if name.startswith("weight") and p.ndim > 1
    }


def negative_log_likelihood(prediction: Prediction, smoothing: float = 0.0) -> Tensor:
    """-log p of each target (B, L); with `smoothing` that share of it is of any code (Szegedy et al. 2016, section 7)."""
    logits, targets = prediction.logits.flatten(0, 1).float(), prediction.targets.flatten()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing).view_as(
        prediction.targets
    )


def weighted_mean(found: Tensor, prediction: Prediction) -> Tensor:
    """The mean (scalar) of what was found for each code (B, L), by what counts."""
    return (found * prediction.weights).mean()
