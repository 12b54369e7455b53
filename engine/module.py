"""The module both stages' training steps are built on: manual optimization under its own clock."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from codegrid.engine.clock import MEETING_EVERY, Budget, CommonClock, Mark, Now, Schedule
from codegrid.engine.collectives import broadcast, separate_random_streams
from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.fsdp import full_tensor
from codegrid.engine.lightning_doors import logged_step

# One that treats matrices apart also has choose_matrices(module, ends) -> set of parameters; these come in groups of their own
# that have matrix=True.
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


class ClockedModule(L.LightningModule, ABC):
    """A module that keeps its own clock.

    `step` counts updates of the model (with two optimizers Lightning's global_step runs double), and `seconds` is the time
    since training began, without the pauses between resumed parts. Both are in the checkpoint.
    """

    players: tuple[str, ...] = ("model",)  # names of the optimizers' models, for the log
    undefined: Mapping[str, str] = {}  # figure -> why it is no number, where that can be

    def __init__(
        self, budget: Budget, schedule: Schedule, clip: float = 1.0, accumulate: int = 1
    ) -> None:
        """`clip` is the largest gradient norm of an update, 0 for any; `accumulate` is micro-batches per update."""
        super().__init__()
        check_range("trainer.clip", clip, 0)
        check_int("trainer.accumulate", accumulate, 1, "micro-batch")
        self.automatic_optimization = False
        self.budget = budget
        self.schedule = schedule
        self.clip = clip
        self.accumulate = accumulate
        self.step = 0
        self.seconds = 0.0
        self.is_updating = False  # whether an update has begun and not ended
        self.replaced: tuple[
            str, ...
        ] = ()  # beginnings of the names of learned weights that this update has placed anew
        self.vitals: dict[str, Tensor] = {}  # the last value of each logged term
        self._terms: dict[str, Tensor] = {}  # the same, for the log: no callback empties it
        # The first step with a NaN or infinite loss or gradient; -1: none. On the module's device from the first update on.
        self.broken = torch.tensor(-1)
        self._last_tick = 0.0
        self._own_seconds = 0.0  # of this rank, where the ranks share a clock
        self._common_clock: CommonClock | None = None  # of several ranks
        self._scaler: torch.amp.GradScaler | None = None

    @property
    def now(self) -> Now:
        return self.budget.now(self.step, self.seconds)

    @property
    def phases(self) -> Mapping[str, Mark]:
        """The parts of a run whose updates differ in what they compute, by names, and when each begins."""
        return {"training": 0}

    def enter(self, mark: Mark) -> None:
        """Set the clock to a moment of the run, as a step or a fraction, for an update that is tried outside a run."""
        steps, minutes = self.budget.max_steps or 0, self.budget.max_minutes or 0
        is_step = isinstance(mark, int)
        self.step = int(mark) if is_step else math.ceil(mark * steps)
        self.seconds = 0.0 if is_step else mark * 60 * minutes

    @property
    @abstractmethod
    def learned(self) -> nn.Module:
        """What is trained to be used later; everything else only helps."""

    def count_parameters(self) -> int:
        """The number of parameters of what is learned, as it is used later."""
        return sum(p.numel() for p in self.learned.parameters())

    def on_fit_start(self) -> None:
        separate_random_streams()  # not earlier: Lightning seeds all ranks alike when they meet

    def on_train_start(self) -> None:
        self._last_tick = time.monotonic()
        if self.trainer.world_size > 1:
            self._own_seconds = self.seconds
            waits = (
                self.device.type != "cpu"
            )  # where no device has to be waited for, ranks meet at each update
            self._common_clock = CommonClock(self.step, self.seconds, MEETING_EVERY if waits else 0)
        self._scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if self.now.progress >= 1:  # resumed when only the last validation was missing
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.is_updating = True  # after the callbacks' hooks: they may save, or end the run

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.is_updating = False

    def tick(self) -> None:
        """Count one more update and its time, and stop when the budget is spent."""
        moment = time.monotonic()
        passed = moment - self._last_tick
        self.step += 1
        self._last_tick = moment
        if self._common_clock is None:
            self.seconds += passed
        else:  # one clock for all ranks, or one would stop before the others
            self._own_seconds += passed
            self.seconds = self._common_clock.tick(self.step, self._own_seconds, self._ask_main)
        if self.now.progress >= 1:
            self.trainer.should_stop = True
        self._log_noted_terms()

    @property
    def ranks_meet(self) -> bool:
        """Whether ranks exchange what only one of them knows, such as a signal, before the next update: about once a second
        on GPUs."""
        return self._common_clock is None or self._common_clock.meets

    def _ask_main(self, seconds: float) -> float:
        """The main rank's value on every rank. Waits for the device."""
        return float(broadcast(torch.tensor(seconds, dtype=torch.float64, device=self.device)))

    def micro_batches(self, batch: Tensor) -> list[tuple[Tensor, float]]:
        """The batch in `accumulate` parts, each with its share of the batch."""
        if len(batch) < self.accumulate:
            raise InputError(
                f"trainer.accumulate={self.accumulate} micro-batches need more than a batch of "
                f"{len(batch)}"
            )
        return [(part, len(part) / len(batch)) for part in batch.tensor_split(self.accumulate)]

    def descend(
        self,
        which: int,
        losses: Iterable[Tensor],
        rate: float,
        betas: Sequence[float] | None = None,
    ) -> Tensor:
        """One update by optimizer number `which`; returns the gradient's norm before clipping.

        `losses` are those of the micro-batches. They may be computed lazily: each goes backward before the next is
        asked for. The gradients add up, and ranks exchange them with the last one. The learning rate is `rate` times the
        optimizer's own; `betas` replace its betas if it has any.
        """
        optimizers = self.optimizers()
        optimizer = optimizers[which] if isinstance(optimizers, list) else optimizers
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if betas is not None and "betas" in group:
                group["betas"] = tuple(betas)
        optimizer.zero_grad()
        is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for n, loss in enumerate(losses, 1):
            is_finite &= loss.detach().isfinite().all()
            with self._local_gradients() if n < self.accumulate else nullcontext():
                self.manual_backward(loss)
        norm = self.clip_gradients_of(optimizer)
        is_finite &= norm.isfinite()
        scale = self.loss_scale
        if isinstance(scale, Tensor):
            # The scaler skips an update that overflows, and halves the scale.
            is_finite = scale > 2**-10
        is_fine = is_finite | (self.broken >= 0)
        self.broken = self.broken.to(self.device).masked_fill(~is_fine, self.step)
        optimizer.step()
        player = self.players[which]
        rate_now = optimizer.param_groups[0]["lr"]
        self.log_terms({f"lr_{player}": rate_now, f"grad_{player}": norm})
        return norm

    def clip_gradients_of(self, optimizer: Any) -> Tensor:
        """Scale the gradients of all parameters down to the norm `clip`; returns their norm before, both without loss scaling."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        largest = self.clip or math.inf
        scale = self.loss_scale
        if not isinstance(scale, Tensor):
            return full_tensor(nn.utils.clip_grad_norm_(parameters, largest))
        gradients = [p.grad for p in parameters if p.grad is not None]
        # clip_grad_norm_ takes a Python number only, for which the host would wait for the scale.
        norm = full_tensor(nn.utils.get_total_norm(gradients)) / scale
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def _local_gradients(self) -> AbstractContextManager[None]:
        """Inside, a backward pass does not exchange gradients with other ranks."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def check(self) -> None:
        """Raise InputError if a loss or gradient was NaN or infinite. Waits for the device, so not for every step."""
        if self.broken >= 0:
            raise InputError(
                "the loss or its gradient is no number (NaN or Inf) since step "
                f"{int(self.broken)}; the last checkpoint, from before that, is kept; "
                "try a lower optimizer.lr or trainer.precision=32-true"
            )

    @property
    def loss_scale(self) -> Tensor | float:
        """The factor of losses before they go backward, so that float16 holds their gradients: a tensor of the device; else 1.0."""
        if self._scaler is None:
            return 1.0
        scale: Tensor = self._scaler.scale(torch.ones((), device=self.device))
        return scale

    def optimizer(
        self,
        make: MakeOptimizer,
        module: nn.Module,
        rates: dict[nn.Parameter, float] | None = None,
        decayed: set[nn.Parameter] | None = None,
        ends: Iterable[nn.Module] = (),
    ) -> Optimizer:
        """An optimizer of the module's trainable parameters that remembers its full learning rates.

        `rates` are learning rates of some parameters as multiples of the others'. Weight decay applies to the parameters
        in `decayed`, or to all. `ends` are the first and last parts, which optimizers of matrices may leave out.
        """
        rates = rates or {}
        choose = getattr(make, "choose_matrices", None)
        matrices = choose(module, ends) if choose is not None else set()
        groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {(1.0, True, False): []}
        for parameter in module.parameters():
            if parameter.requires_grad:
                has_decay = decayed is None or parameter in decayed
                kind = rates.get(parameter, 1.0), has_decay, parameter in matrices
                groups.setdefault(kind, []).append(parameter)
        described: list[dict[str, Any]] = []
        for (_, has_decay, is_matrix), group in groups.items():
            exempt = {} if has_decay else {"weight_decay": 0.0}
            apart = {"matrix": True} if is_matrix else {}
            described.append({"params": group, **exempt, **apart})
        optimizer = make(described)
        for settings, (rate, *_) in zip(optimizer.param_groups, groups, strict=True):
            settings.setdefault("initial_lr", settings["lr"] * rate)
        return optimizer

    def log_terms(self, terms: Mapping[str, Tensor | float]) -> None:
        """Note terms of this update, float32, detached and on the module's device, as this module's `vitals`, and for the next
        step that is logged.

        The device is not waited for: a copy of a Python number would be, so it is written by the device itself.
        """
        for name, value in terms.items():
            self.vitals[name] = self._terms[name] = (
                value.detach().to(torch.float32, copy=True)
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=torch.float32, device=self.device)
            )

    def _log_noted_terms(self) -> None:
        """Log the last value of each term under train/, if this step is logged. Lightning takes a millisecond for a few terms, so
        it gets none of the other steps'."""
        trainer = self.trainer
        n = logged_step(trainer) + 1
        if n % trainer.log_every_n_steps == 0 or trainer.should_stop:  # type: ignore[attr-defined]
            self.log_dict({f"train/{name}": value for name, value in self._terms.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clock"] = {"step": self.step, "seconds": self.seconds}
        checkpoint["terms"] = {name: float(value) for name, value in self._terms.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step = checkpoint["clock"]["step"]
        self.seconds = checkpoint["clock"]["seconds"]
        terms = checkpoint.get("terms", {})  # earlier versions have none
        self._terms = {name: torch.tensor(value) for name, value in terms.items()}
