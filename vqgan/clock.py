"""How long a run lasts, and where in it we are: the clock of every gate, schedule and stopping rule."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import InputError
from vqgan.quantizers.base import from_first_rank

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
Mark = int | float  # a moment of a run: a step (int) or a fraction of the run (float)


@dataclass(frozen=True)
class Now:
    """`step`, the generator's updates so far, and `progress`, the share of the run that is over, 0 to 1."""

    step: int
    progress: float


class Budget:
    """`max_steps` updates or `max_minutes` of training, whichever ends first; at least one of them.

    Under max_minutes the schedules follow the clock: the learning rate reaches its end when the time does, on any
    hardware. Such a run can be resumed, but not repeated to the bit.
    """

    def __init__(self, max_steps: int | None = None, max_minutes: float | None = None) -> None:
        if max_steps is None and max_minutes is None:
            raise InputError("a run needs an end; set trainer.max_steps or trainer.max_minutes")
        for name, value in (("max_steps", max_steps), ("max_minutes", max_minutes)):
            if value is not None and (not isinstance(value, int | float) or value <= 0):
                raise InputError(f"trainer.{name}={value} must be a number above 0")
        self.max_steps, self.max_minutes = max_steps, max_minutes

    def now(self, step: int, seconds: float) -> Now:
        """Where a run is after so many updates and so many seconds of training."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes else 0.0
        return Now(step, min(1.0, max(by_steps, by_time)))


class Schedule:
    """Learning-rate factor: a linear warm-up over `warmup` steps, then a cosine from 1 down to `floor` at the end."""

    def __init__(self, warmup: int = 100, floor: float = 0.02) -> None:
        self.warmup, self.floor = warmup, floor

    def __call__(self, now: Now) -> float:
        rise = min(1.0, (now.step + 1) / self.warmup) if self.warmup else 1.0
        return rise * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * now.progress)) / 2)


class Clocked(L.LightningModule):
    """A module that keeps its own clock: what both stages' training steps stand on.

    `step` counts updates of the model (with two optimizers Lightning's global_step runs double) and `seconds` the time
    since training began, pauses between resumed parts left out. Both are in the checkpoint.
    """

    def __init__(self, budget: Budget, schedule: Schedule, clip: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.budget, self.schedule, self.clip = budget, schedule, clip
        self.step, self.seconds = 0, 0.0
        self._before = 0.0  # the moment of the last tick

    @property
    def now(self) -> Now:
        return self.budget.now(self.step, self.seconds)

    def on_train_start(self) -> None:
        self._before = time.monotonic()

    def tick(self) -> None:
        """One more update done: count it and its time, and stop when the budget is spent."""
        moment = time.monotonic()
        self.step, self.seconds, self._before = self.step + 1, self.seconds + moment - self._before, moment
        if self.trainer.world_size > 1:  # one clock for all ranks, or one would stop before the others
            self.seconds = float(from_first_rank(torch.tensor(self.seconds, device=self.device)))
        if self.now.progress >= 1:
            self.trainer.should_stop = True

    def descend(self, which: int, loss: Tensor, rate: float) -> Tensor:
        """One update by optimizer number `which` at `rate` times its learning rate; the gradient's norm before clipping."""
        found = self.optimizers()
        optimizer = found[which] if isinstance(found, list) else found
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        optimizer.zero_grad()
        self.manual_backward(loss)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
        optimizer.step()
        return norm

    def optimizer(self, make: MakeOptimizer, module: nn.Module, rates: dict[nn.Parameter, float] | None = None) -> Optimizer:
        """An optimizer of the module's trainable parameters that remembers its full learning rates.

        `rates` are those of some parameters as multiples of the others'.
        """
        rates = rates or {}
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in module.parameters():
            if parameter.requires_grad:
                groups.setdefault(rates.get(parameter, 1.0), []).append(parameter)
        made = make([{"params": parameters} for parameters in groups.values()])
        for group, rate in zip(made.param_groups, groups, strict=True):
            group.setdefault("initial_lr", group["lr"] * rate)
        return made

    def log_terms(self, terms: dict[str, Tensor]) -> None:
        """Log these under train/, float32 and detached."""
        self.log_dict({f"train/{name}": value.detach().float() for name, value in terms.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clock"] = {"step": self.step, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step, self.seconds = checkpoint["clock"]["step"], checkpoint["clock"]["seconds"]
