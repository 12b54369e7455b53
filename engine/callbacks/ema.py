"""A running average of the weights, to be evaluated and used in their place."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from codegrid.engine.checkpoint import AVERAGE
from codegrid.engine.errors import check_range
from codegrid.engine.fsdp import full_state, local_shard, shard_like
from codegrid.engine.module import ClockedModule


class WeightAverage(Callback):
    """The mean of the weights over the last updates (Polyak & Juditsky 1992) of what a module learns: a tokenizer with its
    codebook but without the discriminator, or a prior. What does not change stays the same to the bit.

    value <- d * value + (1 - d) * weight after each update, d = min(decay, (1 + n) / (10 + n)) at update n, so that an early
    average spans about the last tenth of the run. Validation, its pictures and whoever loads the checkpoint use the average;
    training continues with the weights themselves. Both are in the checkpoint. Of weights that an update has placed anew, such as
    codes that come into use later, the average begins again.
    """

    def __init__(self, decay: float) -> None:
        check_range("callbacks.average.decay", decay, 0, 1)
        self.decay = decay
        self.values: dict[str, Tensor] = {}
        self._step = 0  # the last update that is in the average
        self._swapped = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = learned_state(module)
        loaded = {
            name: shard_like(self.values.get(name, weight), weight)
            for name, weight in weights.items()
        }
        self.values = {
            name: value.to(weights[name].device, copy=True) for name, value in loaded.items()
        }
        self._step = step_of(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.follow(module)

    @torch.no_grad()
    def follow(self, module: L.LightningModule) -> None:
        """Add the weights of this update, once: a run may break off between an update and the end of its batch."""
        assert isinstance(module, ClockedModule)
        n = step_of(module)
        if self._step == n:
            return
        self._step = n
        decay = min(self.decay, (1 + n) / (10 + n))
        weights = learned_state(module)
        floats = [name for name, weight in weights.items() if weight.is_floating_point()]
        average = [local_shard(self.values[name]) for name in floats]
        current = [local_shard(weights[name]) for name in floats]
        get_ema_multi_avg_fn(decay)(average, current, n)
        anew = {name for name in weights if name.startswith(module.replaced)}
        module.replaced = ()
        for name in anew | weights.keys() - set(floats):  # counters
            self.values[name].copy_(weights[name])

    @torch.no_grad()
    def swap(self, module: L.LightningModule) -> None:
        """Exchange the average and the weights."""
        for name, weight in learned_state(module).items():
            original = weight.clone()
            weight.copy_(self.values[name])
            self.values[name].copy_(original)
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
        if self._swapped:  # or the checkpoint written next would hold each in the other's place
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


def learned_state(module: L.LightningModule) -> dict[str, Tensor]:
    """Parameters and buffers of what the module learns, the tensors themselves; under sharding, this rank's shards."""
    assert isinstance(module, ClockedModule)
    return dict(module.learned.state_dict())
