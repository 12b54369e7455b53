"""A running average of what a module learns, to be judged and used in its place."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.checkpoint import AVERAGE
from engine.errors import check_range
from engine.fsdp import full_state, local_shard, shard_like
from engine.module import ClockedModule


class WeightAverage(Callback):
    """The mean of the weights over the last updates (Polyak & Juditsky 1992): of a tokenizer, codebook and all but without the
    discriminator, or of a prior. What does not change, such as the vectors that a prior reads, stays what it is to the bit.

    value <- d * value + (1 - d) * weight after each update, d = min(decay, (1 + n) / (10 + n)) at update n, so that an early
    average is of about the last tenth of the run. Validation, its pictures and whoever loads the checkpoint use the average;
    training goes on with the weights themselves. Both are in the checkpoint.
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_range("callbacks.average.decay", decay, 0, 1)
        self.decay = decay
        self.values: dict[str, Tensor] = {}
        self._step = 0  # the last update that is in the average
        self._swapped = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        own = weights_of(module)
        kept = {
            name: shard_like(self.values.get(name, value), value) for name, value in own.items()
        }
        self.values = {name: value.to(own[name].device, copy=True) for name, value in kept.items()}
        self._step = step_of(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.follow(module)

    @torch.no_grad()
    def follow(self, module: L.LightningModule) -> None:
        """Take in the weights of this update, once; a run may break off between an update and the end of its batch."""
        if self._step == step_of(module):
            return
        n = self._step = step_of(module)
        decay, own = min(self.decay, (1 + n) / (10 + n)), weights_of(module)
        floats = [name for name, value in own.items() if value.is_floating_point()]
        get_ema_multi_avg_fn(decay)(
            [local_shard(self.values[name]) for name in floats],
            [local_shard(own[name]) for name in floats],
            n,
        )
        for name in own.keys() - set(floats):  # counters
            self.values[name].copy_(own[name])

    @torch.no_grad()
    def swap(self, module: L.LightningModule) -> None:
        """The average takes the weights' place, and the weights its."""
        for name, value in weights_of(module).items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)
        self._swapped = not self._swapped

    def on_validation_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.values:
            self.swap(module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._swapped:
            self.swap(module)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        if (
            self._swapped
        ):  # or the checkpoint that is written next would hold each in the other's place
            self.swap(module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.follow(module)
        checkpoint[AVERAGE] = full_state(self.values)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.values = checkpoint.get(AVERAGE, {})


def step_of(module: L.LightningModule) -> int:
    """The updates so far, by the module's own count."""
    assert isinstance(module, ClockedModule)
    return module.step


def weights_of(module: L.LightningModule) -> dict[str, Tensor]:
    """Everything that makes what the module learns, parameters and buffers, the tensors themselves; where it is sharded,
    this rank's share of them."""
    assert isinstance(module, ClockedModule)
    return dict(module.learned.state_dict())
