"""A module's training step outside Lightning's Trainer, on real tensors or on fake ones: nothing is logged or saved."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.clock import Mark
from codegrid.engine.lightning_doors import stand_in_loop
from codegrid.engine.module import ClockedModule
from codegrid.engine.step_trace import StepTrace

TrainingBatch = tuple[Tensor, Tensor]  # samples and labels, of a datamodule's read_first
HALF_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class StandIn:
    """What a module asks Lightning's Trainer for while it trains on one device."""

    datamodule: Any
    world_size: int = 1
    global_rank: int = 0
    strategy: None = None
    precision_plugin: None = None
    should_stop: bool = False
    log_every_n_steps: int = 1
    fit_loop: Any = field(default_factory=stand_in_loop)


@dataclass(frozen=True)
class StepCost:
    """What an update costs.

    peak        bytes that are alive at most, the state included
    flops       operations of matrix products, convolutions and attention, forward and backward
    part_flops  those of the forward pass, by parts
    part_bytes  what the forward pass of each part leaves for the backward pass
    """

    peak: int
    flops: int
    part_flops: Mapping[str, int]
    part_bytes: Mapping[str, int]


class Rehearsal:
    """Trains a module by its own training step and counts what that costs.

    With `is_fake` a copy is trained whose tensors have shapes, types and a device, but no memory; without, the module itself.
    `precision` is one of PRECISIONS but auto; of the `callbacks` those that average the weights take part.
    """

    def __init__(
        self,
        module: ClockedModule,
        data: Any,
        callbacks: Iterable[Any],
        device: torch.device,
        precision: str,
        is_fake: bool,
    ) -> None:
        self.device, self.precision = device, precision
        self.trainer = cast(Any, StandIn(data))  # the module has a weak reference to it
        self.averages = [copy.copy(each) for each in callbacks if isinstance(each, WeightAverage)]
        self.mode = FakeTensorMode() if is_fake else None
        attach(module, self.trainer)
        module.on_fit_start()
        if self.mode:
            self.module, tensors = copy_as_fake(module, self.mode, device)
        else:
            self.module = module.to(device)
            tensors = [*module.parameters(), *module.buffers()]
        self.trace = StepTrace(device.type, list_parts(self.module))
        with self.inside():
            self.trace.watch(tensors)
            self.optimizers = self.make_optimizers()
            self.module.on_train_start()
            for average in self.averages:
                average.on_train_start(self.trainer, self.module)

    def make_optimizers(self) -> list[Optimizer]:
        """The module's optimizers, which from here on it works with."""
        configured: Any = self.module.configure_optimizers()
        optimizers: list[Optimizer] = configured if isinstance(configured, list) else [configured]
        for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            # What torch chooses by itself on a GPU, but not for fake tensors.
            if self.mode and self.device.type == "cuda" and group.get("foreach", True) is None:
                group["foreach"] = not group.get("fused")
        replacements = {
            "optimizers": lambda: optimizers,
            "manual_backward": lambda loss: loss.backward(),
            "log_dict": lambda *_, **__: None,
        }
        for name, replacement in replacements.items():
            setattr(self.module, name, replacement)
        return optimizers

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, everything is computed as in training, and counted."""
        attach(self.module, self.trainer)
        with self.mode or nullcontext(), self.trace.follow():
            yield

    def step(self, phase: Mark, batch: TrainingBatch) -> StepCost:
        """The cost of an update on a batch in the phase of the run that begins at a mark."""
        trace = self.trace
        with self.inside():
            trace.restart()
            self.train(phase, batch)
        return StepCost(trace.peak, trace.flops, dict(trace.part_flops), trace.part_bytes)

    def train(self, phase: Mark, batch: TrainingBatch) -> None:
        """An update on a batch in the phase of the run that begins at a mark."""
        half = HALF_TYPES.get(self.precision)
        moved = tuple(part.to(self.device) for part in batch)
        self.trace.watch(moved)
        self.module.enter(phase)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            self.module.training_step(moved, 0)
        for average in self.averages:
            average.follow(self.module)

    def blank(self, batch: TrainingBatch, n: int) -> TrainingBatch:
        """A batch of n samples like those of another one, without their content."""
        with self.mode or nullcontext():
            samples, labels = (torch.zeros(n, *x.shape[1:], dtype=x.dtype) for x in batch)
        return samples, labels

    def measure_state(self) -> dict[str, int]:
        """Bytes of what lasts from one update to the next, by kinds."""
        weights = [*self.module.parameters(), *self.module.buffers()]
        trained = [p for p in self.module.parameters() if p.requires_grad]
        moments = chain.from_iterable(
            values.values() for optimizer in self.optimizers for values in optimizer.state.values()
        )
        averaged = chain.from_iterable(average.values.values() for average in self.averages)
        kinds: dict[str, Iterable[Any]] = {
            "weights": weights,
            "gradients": trained,
            "moments": moments,
            "average": averaged,
        }
        return {name: sum(tensor_bytes(x) for x in tensors) for name, tensors in kinds.items()}


def attach(module: ClockedModule, trainer: Any) -> None:
    """Let a module take this for its trainer."""
    module.trainer = trainer


def tensor_bytes(x: Any) -> int:
    """The bytes of a tensor; none of anything else."""
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


def list_parts(module: ClockedModule) -> dict[str, list[nn.Module]]:
    """The parts of a module, name -> modules whose calls are this part: those of what it learns, then what helps it.

    A list of layers is one part.
    """
    helpers = {name: part for name, part in module.named_children() if part is not module.learned}
    parts = {**dict(module.learned.named_children()), **helpers}
    return {
        name: list(part.children()) if isinstance(part, nn.ModuleList) else [part]
        for name, part in parts.items()
    }


class FakeCopies(TorchFunctionMode):
    """Inside, a deep copy of anything has fake tensors on a device in place of its own, which are in `tensors`."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.mode, self.device = mode, device
        self.tensors: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in (torch.Tensor.__deepcopy__, torch.Tensor.clone):  # a parameter clones
            return function(*args, **(kwargs or {}))
        x: Tensor = args[0]
        memo = args[1] if function is torch.Tensor.__deepcopy__ else {}
        if id(x) not in memo:
            with self.mode:
                fake = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=self.device)
            memo[id(x)] = fake
            self.tensors.append(fake)
        return memo[id(x)]


def copy_as_fake(
    module: ClockedModule, mode: FakeTensorMode, device: torch.device
) -> tuple[ClockedModule, list[Tensor]]:
    """A copy of a module on a device whose tensors are fake, and these tensors, those of networks that it hides too."""
    with FakeCopies(mode, device) as copies:
        copied = copy.deepcopy(module)
    # Module.to would exchange tensors, which fake ones refuse; nothing but this attribute is left to change.
    copied._device = device
    return copied, copies.tensors
