"""The training step of stage 2."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim import Optimizer
from torchmetrics import Metric

from codegrid.data.loading import BatchDataModule
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.errors import check_range
from codegrid.engine.fsdp import ShardedStrategy, reshard, unshard
from codegrid.engine.module import ClockedModule, MakeOptimizer
from prior.likelihood import judge_prediction, learning_losses, weighted_mean
from prior.models.base import Prediction, PriorModel
from prior.models.inputs import blank_value
from prior.models.transformer import Block

MAX_TRAINING_GRIDS = 1_000  # training grids that a validation judges as well


class PriorModule(ClockedModule):
    """A prior over code grids, trained by maximum likelihood (VQGAN, Esser et al. 2021, eq. 9) and judged in nats.

    A share `label_drop` of the labels is dropped in training, so that the model also learns the codes of all images alike, which
    guidance needs (Ho & Salimans 2022, algorithm 1).

    A validation judges the whole validation set and, in the same way, some of the training set, for the gap between them.
    """

    loss_map: Tensor  # (h, w) nats per token at each position, in the last validation

    def __init__(
        self,
        model: PriorModel,
        optimizer: MakeOptimizer,
        budget: Budget,
        schedule: Schedule,
        label_drop: float,
        label_smoothing: float,
        **update: Any,
    ) -> None:
        """`update` are the settings of ClockedModule: clip and accumulate."""
        super().__init__(budget, schedule, **update)
        check_range("label_drop", label_drop, 0, 1)
        check_range("label_smoothing", label_smoothing, 0, 1)
        self.model, self.make_optimizer = model, optimizer
        self.label_drop, self.label_smoothing = label_drop, label_smoothing
        self.val_likelihood = LikelihoodMetric(model.L)
        self.train_likelihood = LikelihoodMetric(model.L)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self.model, self.blocks)
            # Called instead of `forward`, since heads need no logits. Once: wrapped twice, it leaves shards behind.
            if self.model.has_features and "features" not in vars(self.model):
                register_fsdp_forward_method(self.model, "features")

    @property
    def blocks(self) -> list[Block]:
        """The model's transformer blocks; empty if it has none."""
        return list_transformer_blocks(self.model)

    @property
    def recomputed(self) -> list[nn.Module]:
        """The parts whose activations the backward pass may compute again."""
        return self.model.recomputed

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        indices, labels = batch
        labels = self.drop_labels(labels)
        micro_batches = zip(
            self.micro_batches(indices), labels.tensor_split(self.accumulate), strict=True
        )
        losses = (share * self.loss(codes, label) for (codes, share), label in micro_batches)
        self.descend(0, losses, self.schedule(self.now))
        self.tick()

    def drop_labels(self, labels: Tensor) -> Tensor:
        """The labels (B, ...) with a share `label_drop` of them replaced by labels that say nothing."""
        if not self.model.is_conditional:
            return labels
        dropped = torch.rand(len(labels), device=labels.device) < self.label_drop
        whole = dropped.view(-1, *[1] * (labels.ndim - 1))
        return labels.masked_fill(whole, blank_value(labels))

    def loss(self, indices: Tensor, labels: Tensor) -> Tensor:
        """The loss of a micro-batch; the log gets the nats, without label smoothing and the like."""
        codes = indices.flatten(1)
        prediction = self.model.learn(codes, self.used(labels), self.now.progress)
        losses, nats = learning_losses(prediction, self.label_smoothing)
        self.log_terms({"loss": weighted_mean(nats, prediction)})
        return weighted_mean(losses, prediction)

    def used(self, labels: Tensor) -> Tensor | None:
        """The labels, or None if the model takes none."""
        return labels if self.model.is_conditional else None

    @property
    def learned(self) -> PriorModel:
        return self.model

    def on_validation_epoch_start(self) -> None:
        # Ranks may have different numbers of batches to judge, and the first rank draws samples alone.
        unshard(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.val_likelihood.update(self.judge(*batch))

    def judge(self, indices: Tensor, labels: Tensor) -> Prediction:
        return self.model.judge(indices.flatten(1), self.used(labels))

    def judge_training(self) -> None:
        """Judge this rank's share of as many training grids as there are validation grids, at most 1,000, always the same."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, BatchDataModule)
        grids, labels = data.take_evenly("train", min(data.size("val"), MAX_TRAINING_GRIDS))
        share = slice(self.global_rank, None, self.trainer.world_size)
        for indices, label in zip(
            grids[share].split(data.batch_size), labels[share].split(data.batch_size), strict=True
        ):
            # The precision of a validation step, which Lightning sets for its own steps only.
            with self.trainer.precision_plugin.val_step_context():
                prediction = self.judge(indices.to(self.device).long(), label.to(self.device))
                self.train_likelihood.update(prediction)

    def on_validation_epoch_end(self) -> None:
        self.judge_training()
        reshard(self.model)
        val, train = self.val_likelihood.compute(), self.train_likelihood.compute()
        nats_per_token = val["nats"].mean()
        self.loss_map = self.model.map_nats(val["nats"])
        figures = {
            "nats_per_token": nats_per_token,
            "bits_per_image": nats_per_token * self.model.L / math.log(2),
            "top1": val["top1"],
            "top5": val["top5"],
            "gap": nats_per_token - train["nats"].mean(),
            "nats_easiest_place": self.loss_map.min(),
            "nats_hardest_place": self.loss_map.max(),
        }
        self.log_dict({f"val/{name}": value.float() for name, value in figures.items()})
        self.val_likelihood.reset()
        self.train_likelihood.reset()

    def configure_optimizers(self) -> Optimizer:
        decayed = decayed_weights(self.model)
        return self.optimizer(
            self.make_optimizer, self.model, decayed=decayed, ends=self.model.ends
        )


class LikelihoodMetric(Metric):
    """A prior's likelihood and accuracy over all grids of all ranks, each grid with the same weight.

    nats (L,): -log p at each position. top1, top5: the share of the predicted codes that are the most likely, or among the
    five most likely. Ties are broken at random, in expectation, so a uniform prior has k / K.
    """

    full_state_update = False
    nats: Tensor
    hits: Tensor
    tokens: Tensor
    grids: Tensor

    def __init__(self, L: int) -> None:
        super().__init__()
        shapes = {"nats": (L,), "hits": (2,), "tokens": (), "grids": ()}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Prediction) -> None:
        judged = judge_prediction(prediction)
        predicted = prediction.weights > 0
        for n, k in enumerate((1, 5)):
            hits = ((k - judged.above) / judged.tied).clamp(0, 1)
            self.hits[n] += (hits * predicted).sum(dtype=torch.float64)
        self.tokens += predicted.sum()
        nats = judged.nats * prediction.weights
        self.nats += nats.sum(0, dtype=torch.float64)
        self.grids += len(predicted)

    def compute(self) -> dict[str, Tensor]:
        return {
            "nats": self.nats / self.grids,
            "top1": self.hits[0] / self.tokens,
            "top5": self.hits[1] / self.tokens,
        }


def decayed_weights(module: nn.Module) -> set[nn.Parameter]:
    """The weights of linear maps, convolutions and recurrences: only these decay.

    Norms, biases, and the vectors of codes, labels and places gain nothing from being small.
    """
    return {
        p
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for name, p in part.named_parameters(recurse=False)
        if name.startswith("weight") and p.ndim > 1
    }


def list_transformer_blocks(model: PriorModel) -> list[Block]:
    """The transformer blocks of a prior; empty if it has none."""
    return [part for part in model.modules() if isinstance(part, Block)]
