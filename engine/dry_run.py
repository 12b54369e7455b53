"""dry_run=true: what an update or a batch costs, whether it works, and which batches fit into which memory."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from codegrid.engine.clock import Mark
from codegrid.engine.console import log_line
from codegrid.engine.environment import GIB, MIB, read_peak_memory, reset_peak_memory
from codegrid.engine.host_memory import free_memory
from codegrid.engine.module import ClockedModule
from codegrid.engine.precision import best_precision
from codegrid.engine.rehearsal import Rehearsal, StepCost, TrainingBatch, list_parts
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.step_trace import StepTrace

CARDS = (8, 11, 16, 24, 40, 80)  # GiB
USABLE = 0.9  # share of a card that tensors can have; the rest goes to gaps between them
CONTEXT = 0.5  # GiB of a card that the driver and its libraries take
SLOW = 10.0  # seconds of an update, after which no second one is tried
SMALLER, LARGER = 8, 8  # other batches by which memory is extrapolated, as factors of the run's own


# What fake tensors raise where an operation needs values, or has no rule for them.
UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True)
class Forecast:
    """What training will cost.

    phases   the cost of an update with the run's batch in each phase of the run
    state    bytes of what lasts from one update to the next, by kinds
    points   batch size -> bytes at the peak, for several batches in the costliest phase
    is_real  whether it was counted while the model trained on the device, for want of fake tensors
    """

    phases: Mapping[str, StepCost]
    state: Mapping[str, int]
    points: Mapping[int, int]
    is_real: bool = False

    @property
    def costliest(self) -> str:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> int:
        """Bytes at the peak with the run's batch."""
        return self.phases[self.costliest].peak

    def memory(self, n: int) -> float:
        """Bytes at the peak with batches of n: between two points, or beyond the last ones, on a line through both."""
        sizes = sorted(self.points)
        low, high = next((pair for pair in pairwise(sizes) if n <= pair[1]), (sizes[-2], sizes[-1]))
        slope = (self.points[high] - self.points[low]) / (high - low)
        return self.points[low] + slope * (n - low)

    def largest_batch(self, limit: float) -> int:
        """The largest batch whose peak is within a limit in bytes; 0 if there is none."""
        if self.memory(1) > limit:
            return 0
        low, high = 1, 2
        while self.memory(high) <= limit and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle) <= limit else (low, middle)
        return low


def rehearse_training(
    module: ClockedModule,
    data: Any,
    settings: TrainerSettings,
    device: torch.device,
    callbacks: Iterable[Any],
) -> dict[str, Any]:
    """Forecast the cost of training a module, try two updates if they fit, and print both; the figures. Nothing is written.

    `data` is the datamodule of the run.
    """
    precision = best_precision() if settings.precision == "auto" else settings.precision
    batch: TrainingBatch = data.read_first(data.batch_size)
    log_line(f"batches of {data.batch_setting}={data.batch_size}, precision {precision}")
    if not any(p.requires_grad for p in module.parameters()):
        log_line(
            f"{type(module.learned).__name__} has nothing to train: it is fitted by counting, then validated"
        )
        return {"parameters": module.count_parameters()}
    around = [*callbacks]
    forecast = forecast_training(module, data, batch, around, device, precision)
    for line in describe_forecast(forecast, module, len(batch[0])):
        log_line(line)
    trial = try_updates(forecast, module, data, batch, around, device, precision)
    for line in describe_trial(trial):
        log_line(line)
    return {**summarize_forecast(forecast, module), **trial}


def forecast_training(
    module: ClockedModule,
    data: Any,
    batch: TrainingBatch,
    callbacks: Sequence[Any],
    device: torch.device,
    precision: str,
) -> Forecast:
    """What training a module will cost, without training it; if its step looks at values, by training it."""
    settings = module, data, callbacks, device, precision
    try:
        return make_forecast(Rehearsal(*settings, is_fake=True), batch)
    except UNTRACEABLE as error:
        log_line(
            f"the training step can't be followed without values ({type(error).__name__}: {error}), so memory is counted "
            "while it trains on a batch without content"
        )
        return make_forecast(Rehearsal(*settings, is_fake=False), batch)


def make_forecast(rehearsal: Rehearsal, batch: TrainingBatch) -> Forecast:
    """The forecast of a rehearsal: each phase with the run's batch, then other batches in the costliest phase."""
    n, accumulate = len(batch[0]), rehearsal.module.accumulate
    phases = rehearsal.module.phases
    blank = rehearsal.blank(batch, n)
    for mark in phases.values():  # each may be the only one in which a part learns and gets moments
        rehearsal.step(mark, blank)
    costs = {name: rehearsal.step(mark, blank) for name, mark in phases.items()}
    costliest = max(costs, key=lambda name: costs[name].peak)
    sizes = {max(accumulate, n // SMALLER), LARGER * n if rehearsal.mode else n}
    sizes |= {2 * n} if sizes == {n} else set()
    others = {size: rehearsal.blank(batch, size) for size in sorted(sizes - {n})}
    points = {n: costs[costliest].peak} | {
        size: rehearsal.step(phases[costliest], other).peak for size, other in others.items()
    }
    return Forecast(costs, rehearsal.measure_state(), points, is_real=rehearsal.mode is None)


def try_updates(
    forecast: Forecast,
    module: ClockedModule,
    data: Any,
    batch: TrainingBatch,
    callbacks: Sequence[Any],
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """Updates on the run's first samples in the costliest phase, if the device has the memory: two, or one if that is slow; the
    seconds of the last one, the GiB at the peak, and whether loss and gradient were numbers. None if the forecast `is_real`."""
    untried = {"seconds": None, "measured_gib": None, "finite": None}
    if forecast.is_real:
        return untried
    free = free_memory(device)
    if free is not None and forecast.peak > free:
        return {"free_gib": round(free / GIB, 2), **untried}
    before = reset_peak_memory(device)
    rehearsal = Rehearsal(module, data, callbacks, device, precision, is_fake=False)
    phase = rehearsal.module.phases[forecast.costliest]
    seconds = time_update(rehearsal, phase, batch)
    if seconds < SLOW:
        seconds = time_update(rehearsal, phase, batch)
    peak = read_peak_memory(device)
    measured = None if before is None or peak is None else round((peak - before) / GIB, 3)
    # float16 overflows in the first updates of a run, whose loss scale then falls; here there is none.
    finite = None if precision == "16-mixed" else int(rehearsal.module.broken) < 0
    return {"seconds": round(seconds, 3), "measured_gib": measured, "finite": finite}


def time_update(rehearsal: Rehearsal, phase: Mark, batch: TrainingBatch) -> float:
    """The seconds of an update."""
    start = time.monotonic()
    rehearsal.train(phase, batch)
    if rehearsal.device.type == "cuda":
        torch.cuda.synchronize(rehearsal.device)
    return time.monotonic() - start


def preview_batch(
    device: torch.device, models: Mapping[str, nn.Module], n: int, work: Callable[[], Any]
) -> dict[str, Any]:
    """Do the work of n samples on these models, name -> model, and print their parts and what it took; the figures."""
    parts = {
        f"{name}.{child}": list(part.children()) if isinstance(part, nn.ModuleList) else [part]
        for name, model in models.items()
        for child, part in model.named_children()
    }
    trace = StepTrace(device.type, parts)
    start = time.monotonic()
    with trace.follow():
        for model in models.values():
            trace.watch(chain(model.parameters(), model.buffers()))
        work()
    seconds = time.monotonic() - start
    log_line(f"{'':22}{'parameters':>12}{'GFLOP':>10}   for each sample")
    for name, modules in parts.items():
        size = sum(p.numel() for part in modules for p in part.parameters())
        flops = trace.part_flops[name] / n
        if size or flops:
            log_line(f"  {name:20}{size:>12,}{flops / 1e9:>10.3f}")
    log_line(f"a batch of {n} was tried: {seconds:.2f} s, {trace.peak / GIB:.3f} GiB at the peak")
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    gflops = round(trace.flops / 1e9, 1)
    costs = {"seconds": round(seconds, 3), "memory_gib": round(trace.peak / GIB, 3)}
    return {"parameters": sizes, "batch": n, "gflops": gflops, **costs}


def describe_forecast(forecast: Forecast, module: ClockedModule, n: int) -> list[str]:
    """A forecast for batches of n, as lines for the terminal."""
    lines = [f"{'':22}{'parameters':>12}{'GFLOP':>10}{'MiB':>10}   forward, for each sample"]
    for name, modules in list_parts(module).items():
        size = sum(p.numel() for part in modules for p in part.parameters())
        flops = max(cost.part_flops.get(name, 0) for cost in forecast.phases.values()) / n
        saved = max(cost.part_bytes.get(name, 0) for cost in forecast.phases.values()) / n
        if not (size or flops or saved):
            continue
        lines.append(f"  {name:20}{size:>12,}{flops / 1e9:>10.3f}{saved / MIB:>10.2f}")
    kinds = ", ".join(f"{name} {size / GIB:.3f}" for name, size in forecast.state.items() if size)
    lines.append(f"GiB from one update to the next: {kinds}")
    for name, cost in forecast.phases.items():
        lines.append(
            f"{name}: {cost.peak / GIB:.3f} GiB at the peak, {cost.flops / 1e9:,.1f} GFLOP an update"
        )
    batches = ", ".join(f"{size} GB {largest:,}" for size, largest in fit_cards(forecast).items())
    lines.append(
        f"largest batch in {batches} ({USABLE:.0%} of a card is counted on, less {CONTEXT} GiB for its driver)"
    )
    return lines


def fit_cards(forecast: Forecast) -> dict[int, int]:
    """The largest batch that fits on cards, by their GiB; 0 for none."""
    return {size: forecast.largest_batch((USABLE * size - CONTEXT) * GIB) for size in CARDS}


def describe_trial(trial: Mapping[str, Any]) -> list[str]:
    """Whether updates were tried and what they took, as lines for the terminal."""
    if "free_gib" in trial:
        free = trial["free_gib"]
        return [f"no update was tried: {free} GiB are free, which is less than the peak"]
    if trial["seconds"] is None:
        return ["no further update was tried: those that were counted have trained on this device"]
    measured = trial["measured_gib"]
    memory = "" if measured is None else f", and {measured:.3f} GiB were measured at the peak"
    lines = [f"updates were tried: the last one took {trial['seconds']:.2f} s{memory}"]
    if trial["finite"] is False:
        lines.append(
            "the loss or its gradient was no number (NaN or Inf) in an update that was tried; such a run ends with its first "
            "checkpoint: try a lower optimizer.lr or trainer.precision=32-true"
        )
    return lines


def summarize_forecast(forecast: Forecast, module: ClockedModule) -> dict[str, Any]:
    """The figures of a forecast."""
    phases = forecast.phases
    return {
        "parameters": module.count_parameters(),
        "memory_gib": round(forecast.peak / GIB, 3),
        "state_gib": round(sum(forecast.state.values()) / GIB, 3),
        "phases": {name: round(cost.peak / GIB, 3) for name, cost in phases.items()},
        "gflops": {name: round(cost.flops / 1e9, 1) for name, cost in phases.items()},
        "largest_batch": fit_cards(forecast),
    }
