"""A training step of stage 2 never waits for the device: it runs on the device "meta", whose tensors have no values, and on real
values of the CPU no operation looks at one."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.callbacks.progress import Progress
from codegrid.engine.callbacks.signals import Signals
from codegrid.engine.callbacks.throughput import Throughput
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.loggers import CSVSeries
from codegrid.engine.module import MakeOptimizer
from codegrid.engine.muon import Muon
from prior.callbacks import PriorDoctor
from prior.models.counted import Counted
from prior.module import PriorModule
from tests.helpers.looks import HostLooks, Look, watch_training
from tests.helpers.parts import make
from tests.helpers.priors import PRIORS, build_prior, condition_on, make_conditions
from tests.helpers.stage2 import (
    ABOUT,
    UNEVEN_GRID,
    UNEVEN_K,
    lightning_warnings,
    make_code_data,
)

pytestmark = lightning_warnings

LEARNED = [name for name, case in PRIORS.items() if not issubclass(case.kind, Counted)]
DROPOUT = {"dropout": 0.1}
ALL_ON = {"label_drop": 0.1, "label_smoothing": 0.1, "accumulate": 2}
PLAIN = {"label_drop": 0.0, "label_smoothing": 0.0, "clip": 0.0}


def make_trained(
    name: str,
    optimizer: MakeOptimizer,
    steps: int = 3,
    classes: int = 3,
    condition: str | None = None,
    **update: Any,
) -> PriorModule:
    torch.manual_seed(0)
    model = build_prior(PRIORS[name], UNEVEN_K, UNEVEN_GRID, classes=classes, **DROPOUT)
    if condition:
        condition_on(model, condition)
    return PriorModule(model, optimizer, Budget(steps), make(Schedule), **{**ALL_ON, **update})


def adamw(**settings: Any) -> MakeOptimizer:
    return partial(torch.optim.AdamW, lr=1e-3, **settings)


def around() -> list[Callback]:
    """What a run has around each step."""
    return [make(WeightAverage), make(PriorDoctor), Throughput(), Signals()]


def watch(device: str, module: PriorModule, name: str = "gpt", **settings: Any) -> HostLooks:
    callbacks = around()
    if device != "meta":  # it shows the last step's loss
        callbacks.append(Progress({"train/loss": "loss"}))
    looks = HostLooks(device)
    data = make_code_data(name, 16)
    if module.model.is_conditional and not module.model.classes:
        for codes in data.codes.values():
            codes.labels = make_conditions(module.model, len(codes)).numpy()
    watch_training(looks, module, data, callbacks, **settings)
    assert module.step == module.budget.max_steps
    return looks


@pytest.mark.parametrize("name", LEARNED)
def test_a_step_runs_on_a_device_without_values(name: str) -> None:
    watch("meta", make_trained(name, adamw(foreach=True)), name)


@pytest.mark.parametrize("name", LEARNED)
def test_no_operation_of_a_step_looks_at_a_value(name: str) -> None:
    watch("cpu", make_trained(name, adamw(fused=True)), name)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("condition", ["vectors", "two codebooks"])
@pytest.mark.parametrize("name", ["gpt", "maskgit", "lstm"])
def test_neither_does_a_step_with_conditions(name: str, condition: str, device: str) -> None:
    fused = device == "cpu"
    optimizer = adamw(fused=fused, foreach=not fused)
    watch(device, make_trained(name, optimizer, classes=0, condition=condition), name)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_neither_does_a_plain_step_without_classes_and_clipping(
    device: str, optimizer: str
) -> None:
    fused = device == "cpu"
    chosen = (
        adamw(fused=fused, foreach=not fused) if optimizer == "adamw" else make(Muon, fused=fused)
    )
    watch(device, make_trained("gpt", chosen, classes=0, **PLAIN))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["gpt", "maskgit", "lstm"])
def test_neither_does_a_step_in_mixed_precision(name: str, precision: Any) -> None:
    """The scaler of float16 leaves the skipping of an update to a fused optimizer, which decides on the device."""
    plugin = MixedPrecision(precision, "cpu")  # Lightning's own would be for CUDA
    watch("cpu", make_trained(name, adamw(fused=True)), name, plugins=[plugin])


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().abs().flatten().bincount(),
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: torch.tensor(1.0, device=x.device),
    "a list": lambda x: x.new_tensor([1.0, 2.0]),
    "a tensor": lambda x: torch.ones(2).to(x.device),
    "a factor": lambda x: x * torch.tensor(2.0),
    "an index": lambda x: x[torch.tensor([0])],
    "from the device": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
}


class Planted(PriorModule):
    """Does something with the loss that the host has to wait for."""

    mistake: Callable[[Tensor], Any]

    def loss(self, indices: Tensor, labels: Tensor) -> Tensor:
        loss = super().loss(indices, labels)
        if self.step == 1:
            self.mistake(loss.detach().view(1))
        return loss


@pytest.mark.parametrize(
    ("device", "mistake"),
    [
        *(pytest.param(device, LOOKS[name], id=f"{device} {name}") for name in LOOKS for device in ("meta", "cpu")),
        *(pytest.param("meta", COPIES[name], id=f"meta {name}") for name in COPIES),
    ],
)  # fmt: skip
def test_a_look_in_a_step_is_caught(device: str, mistake: Callable[[Tensor], Any]) -> None:
    module = make_trained("gpt", adamw(foreach=True))
    module.__class__ = Planted
    module.mistake = mistake  # type: ignore[attr-defined]
    with pytest.raises(Look, match=r"tests/prior/test_meta\.py"):
        watch(device, module)


class CountLooks(Callback):
    """The looks so far at the beginning of each batch, that is after everything else of the batch before."""

    def __init__(self, looks: HostLooks) -> None:
        self.looks, self.counts = looks, [0]

    def on_train_batch_start(self, *_: Any) -> None:
        self.counts.append(len(self.looks.looks))


def test_what_must_look_does_so_at_logged_steps_and_every_n_updates_only(tmp_path: Path) -> None:
    module = make_trained("gpt", adamw(fused=True), steps=13)
    looks = HostLooks("cpu", raises=False)
    counter = CountLooks(looks)
    doctor, progress = make(PriorDoctor, every=6), Progress({"train/loss": "loss"})
    callbacks = [
        Checkpoints(ABOUT, every=8),
        make(WeightAverage),
        doctor,
        progress,
        Throughput(),
        Signals(),
        counter,
    ]
    watch_training(
        looks, module, make_code_data("gpt", 16), callbacks, default_root_dir=tmp_path,
        logger=CSVSeries(str(tmp_path), "csv"), log_every_n_steps=5, watched=range(13),
    )  # fmt: skip
    per_step = [after - before for before, after in pairwise(counter.counts)]
    assert [step for step, n in enumerate(per_step) if n] == [5, 6, 8, 10, 12]
    files = {Path(look.partition(" at ")[2].partition(":")[0]).name for look in looks.looks}
    # Lightning's conversion of what is logged, and of ours: the bar, check() and what a checkpoint holds.
    assert files == {"apply_func.py", "progress.py", "module.py", "checkpointing.py"}
