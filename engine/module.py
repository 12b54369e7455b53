"""The module both stages' training steps are built on: manual optimization under its own clock."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.clock import Budget, Now, Schedule
from engine.distributed import broadcast, separate_random_streams
from engine.errors import InputError, check_int, check_range
from engine.fsdp import full_tensor

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


class ClockedModule(L.LightningModule, ABC):
    """A module that keeps its own clock: what both stages' training steps stand on.

    `step` counts updates of the model (with two optimizers Lightning's global_step runs double) and `seconds` the time
    since training began, pauses between resumed parts left out. Both are in the checkpoint.
    """

    players: tuple[str, ...] = ("model",)  # whose the optimizers are, for the log

    def __init__(
        self, budget: Budget, schedule: Schedule, clip: float = 1.0, accumulate: int = 1
    ) -> None:
        """`clip` is the longest gradient that an update follows, 0 for any; `accumulate` how many micro-batches it is of."""
        super().__init__()
        check_range("trainer.clip", clip, 0)
        check_int("trainer.accumulate", accumulate, 1, "micro-batch")
        self.automatic_optimization = False
        self.budget, self.schedule, self.clip, self.accumulate = budget, schedule, clip, accumulate
        self.step, self.seconds = 0, 0.0
        self.vitals: dict[str, Tensor] = {}  # the last of each term that was logged
        self.broken = torch.tensor(
            -1
        )  # the first step whose loss or gradient was no number; -1: none
        self._before = 0.0  # the moment of the last tick
        self._scaler: torch.amp.GradScaler | None = None

    @property
    def now(self) -> Now:
        return self.budget.now(self.step, self.seconds)

    @property
    @abstractmethod
    def learned(self) -> nn.Module:
        """What is trained to be used; all else only helps."""

    def on_fit_start(self) -> None:
        separate_random_streams()  # not sooner: Lightning seeds all ranks alike when it brings them together

    def on_train_start(self) -> None:
        self._before = time.monotonic()
        self._scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if self.now.progress >= 1:  # resumed when all was done but the last validation
            self.trainer.should_stop = True

    def tick(self) -> None:
        """One more update done: count it and its time, and stop when the budget is spent."""
        moment = time.monotonic()
        self.step, self.seconds, self._before = (
            self.step + 1,
            self.seconds + moment - self._before,
            moment,
        )
        if (
            self.trainer.world_size > 1
        ):  # one clock for all ranks, or one would stop before the others
            self.seconds = float(broadcast(torch.tensor(self.seconds, device=self.device)))
        if self.now.progress >= 1:
            self.trainer.should_stop = True

    def micro(self, batch: Tensor) -> list[tuple[Tensor, float]]:
        """The micro-batches that a batch is worked through in, `accumulate` of them, each with its share of the batch."""
        if len(batch) < self.accumulate:
            raise InputError(
                f"trainer.accumulate={self.accumulate} micro-batches need more than a batch of {len(batch)}"
            )
        return [(part, len(part) / len(batch)) for part in batch.tensor_split(self.accumulate)]

    def descend(
        self,
        which: int,
        losses: Iterable[Tensor],
        rate: float,
        betas: Sequence[float] | None = None,
    ) -> Tensor:
        """One update by optimizer number `which` at `rate` times its learning rate, with these betas where it has any and
        some are given; the gradient's norm before clipping.

        The losses are those of the micro-batches, in the making: each is gone backward through before the next is made,
        and the gradients, whose sum counts, are shared between ranks with the last.
        """
        found = self.optimizers()
        optimizer = found[which] if isinstance(found, list) else found
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if betas is not None and "betas" in group:
                group["betas"] = tuple(betas)
        optimizer.zero_grad()
        sound = torch.ones((), dtype=torch.bool, device=self.device)
        for n, loss in enumerate(losses, 1):
            sound &= loss.detach().isfinite().all()
            with self._alone() if n < self.accumulate else nullcontext():
                self.manual_backward(loss)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scale = self.loss_scale
        norm = (
            full_tensor(
                nn.utils.clip_grad_norm_(parameters, scale * self.clip if self.clip else math.inf)
            )
            / scale
        )
        sound &= norm.isfinite()
        if (
            self._scaler is not None
        ):  # it leaves out an update that overflows and halves the scale, and may do so ten times over
            sound = torch.tensor(scale > 2**-10, device=self.device)
        self.broken = torch.where(
            sound | (self.broken >= 0), self.broken.to(self.device), self.step
        )
        optimizer.step()
        player = self.players[which]
        self.log_terms(
            {f"lr_{player}": torch.tensor(optimizer.param_groups[0]["lr"]), f"grad_{player}": norm}
        )
        return norm

    def _alone(self) -> AbstractContextManager[None]:
        """Inside, a backward pass keeps its gradients to its own rank."""
        strategy = self.trainer.strategy
        return (
            strategy.block_backward_sync()
            if isinstance(strategy, ParallelStrategy)
            else nullcontext()
        )

    def check(self) -> None:
        """Raise InputError where a loss or a gradient was no number. Waits for the device: not for every step."""
        if self.broken >= 0:
            raise InputError(
                f"the loss or its gradient is no number (NaN or Inf) since step {int(self.broken)}; the last checkpoint, "
                "from before that, is kept; try a lower optimizer.lr or trainer.precision=32-true"
            )

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before they go backward, so that float16 holds their gradients; else 1."""
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def optimizer(
        self,
        make: MakeOptimizer,
        module: nn.Module,
        rates: dict[nn.Parameter, float] | None = None,
        decayed: set[nn.Parameter] | None = None,
    ) -> Optimizer:
        """An optimizer of the module's trainable parameters that remembers its full learning rates.

        `rates` are those of some parameters as multiples of the others'; weight decay is of those `decayed`, or of all.
        """
        rates = rates or {}
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): []}
        for parameter in module.parameters():
            if parameter.requires_grad:
                kind = rates.get(parameter, 1.0), decayed is None or parameter in decayed
                groups.setdefault(kind, []).append(parameter)
        made = make(
            [
                {"params": group, **({} if decay else {"weight_decay": 0.0})}
                for (_, decay), group in groups.items()
            ]
        )
        for group, (rate, _) in zip(made.param_groups, groups, strict=True):
            group.setdefault("initial_lr", group["lr"] * rate)
        return made

    def log_terms(self, terms: dict[str, Tensor]) -> None:
        """Log these under train/, float32 and detached, and keep them as this module's `vitals`."""
        self.vitals |= {name: value.detach().float() for name, value in terms.items()}
        self.log_dict({f"train/{name}": self.vitals[name] for name in terms})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clock"] = {"step": self.step, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step, self.seconds = checkpoint["clock"]["step"], checkpoint["clock"]["seconds"]
