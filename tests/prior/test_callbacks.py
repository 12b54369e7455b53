"""The callbacks of a prior's training: the best weights, the doctor, early stopping, the loss map."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from PIL import Image

from data.tokens import CodeDataModule
from engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from engine.callbacks.ema import WeightAverage
from engine.checkpoint import read_checkpoint, substate
from engine.clock import Budget, Schedule
from engine.errors import InputError
from engine.folder import BEST, LAST
from prior.callbacks import LossMapPictures, PriorDoctor
from prior.module import Prior
from tests.helpers.parts import make
from tests.helpers.stage2 import (
    ABOUT,
    GRID,
    LABEL_SETTINGS,
    NATS,
    lightning_warnings,
    make_codes,
    make_gpt,
    make_prior_module,
    make_trainer,
)

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


def around(patience: int = 10, decay: float = 0.9) -> list[Any]:
    """The callbacks of stage=prior, in their order."""
    stop = EarlyStopping(NATS, patience=patience)
    return [
        BestCheckpoint(ABOUT, NATS),
        WeightAverage(decay),
        make(PriorDoctor, every=5),
        stop,
        Checkpoints(ABOUT, 3),
    ]


def few(steps: int) -> tuple[Prior, CodeDataModule]:
    """A prior that can learn its 30 grids by heart."""
    torch.manual_seed(0)
    model = make_gpt()
    data = CodeDataModule(make_codes(30, 0), make_codes(60, 1), batch_size=15, seed=0)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return Prior(model, optimizer, Budget(steps), make(Schedule, warmup=5), **LABEL_SETTINGS), data


@dataclass
class Run:
    """A run that over-fits, and its folder."""

    module: Prior
    best: BestCheckpoint
    doctor: PriorDoctor
    folder: Path


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("overfit")
    (module, data), callbacks = few(400), around(patience=6)
    make_trainer(val_every=10, callbacks=callbacks, default_root_dir=folder).fit(module, data)
    return Run(module, callbacks[0], callbacks[2], folder)


def test_over_fitting_is_reported_once_and_with_a_cure(overfit: Run) -> None:
    [message] = overfit.doctor.alarms
    assert f"at step {overfit.best.step}, while training went from" in message
    assert "the prior over-fits" in message
    assert "try prior.dropout=0.1 prior.token_dropout=0.1" in message
    assert (overfit.folder / "doctor.txt").read_text() == message + "\n"


def test_a_run_ends_when_its_validations_have_been_no_better_for_some_time(overfit: Run) -> None:
    assert overfit.module.step == overfit.best.step + 6 * 10
    assert read_checkpoint(overfit.folder / LAST, "prior")["clock"]["step"] == overfit.module.step


def test_the_best_weights_are_kept_as_the_validation_saw_them(overfit: Run) -> None:
    best = read_checkpoint(overfit.folder, "prior")
    module, data = few(1)
    module.model.load_state_dict(substate(best["state_dict"], "model"))
    [figures] = make_trainer().validate(module, data, verbose=False)
    assert figures[NATS] == best["lowest"] == overfit.best.lowest
    assert {
        name: round(figures[f"val/{name}"], 4) for name in best["figures"]
    } == overfit.best.figures
    [last] = make_trainer().validate(overfit.module, data, verbose=False)
    assert last[NATS] > figures[NATS] + 0.05


def test_a_resumed_run_knows_its_best(overfit: Run) -> None:
    again = BestCheckpoint(ABOUT, NATS)
    again.setup(make_trainer(default_root_dir=overfit.folder), overfit.module, "fit")
    assert (again.lowest, again.step, again.figures) == (
        overfit.best.lowest,
        overfit.best.step,
        overfit.best.figures,
    )


def test_no_average_and_no_worse_weights_take_the_place_of_the_best(tmp_path: Path) -> None:
    module, data = make_prior_module(steps=4, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    best = BestCheckpoint(ABOUT, NATS)
    make_trainer(val_every=2, callbacks=[best], default_root_dir=tmp_path).fit(module, data)
    assert best.step == 2  # the same again is not better
    torch.nn.init.constant_(module.model.head.weight, torch.nan)
    make_trainer(callbacks=[best], default_root_dir=tmp_path).validate(module, data, verbose=False)
    assert read_checkpoint(tmp_path / BEST, "prior")["clock"]["step"] == 2


FALLS = [(3.0, 3.0), (2.0, 1.9), (1.5, 1.2)]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([(1.4, 1.0)], []),
        ([(1.505, 1.1)], []),  # within the margin
        ([(1.6, 1.3)], []),  # training is worse too: that is noise, or a learning rate too high
        ([(1.6, 1.1)], ["overfitting"]),
        ([(1.6, 1.1), (1.4, 1.0)], []),
    ],
)
def test_over_fitting_is_a_validation_that_rises_while_training_falls(
    more: list[tuple[float, float]], expected: list[str]
) -> None:
    doctor, (module, _) = make(PriorDoctor, margin=0.01), make_prior_module()
    for pair in FALLS + more:
        signs = [sign.name for sign in doctor.signs(module, *pair)]
    assert signs == expected


def test_a_prior_that_learns_nothing_of_how_codes_go_together_is_found(tmp_path: Path) -> None:
    module, data = make_prior_module(steps=10, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    doctor = make(PriorDoctor, patience=2, late=0.5)
    make_trainer(val_every=2, callbacks=[doctor], default_root_dir=tmp_path).fit(module, data)
    [message] = doctor.alarms
    assert message.startswith(
        "step 8: the prior has learned nothing of how codes go together: it takes 1.792 nats per token"
    )


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 7:
                module.model.head.weight.data[0] = float("nan")  # type: ignore[union-attr,index,operator]

    module, data = make_prior_module(steps=40)
    with pytest.raises(InputError, match="since step 7"):
        make_trainer(
            callbacks=[Spoil(), make(PriorDoctor, every=5)], default_root_dir=tmp_path
        ).fit(module, data)
    assert module.step == 10


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 0}, {"margin": -1}, {"late": 2}])
def test_a_doctor_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"callbacks.doctor."):
        make(PriorDoctor, **wrong)


class Break(Callback):
    """The power fails at a step: in training, in a validation or after one."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError("the power failed")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.fail(f"training {module.step}")  # type: ignore[attr-defined]

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        _: int = 0,
    ) -> None:
        self.fail(f"validation {module.step}.{batch_idx}")  # type: ignore[attr-defined]

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        _: int = 0,
    ) -> None:
        self.fail(f"validated {module.step}.{batch_idx}")  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.fail(f"after {module.step}")  # type: ignore[attr-defined]


class Judge(Callback):
    """Notes the step and the nats of each validation."""

    def __init__(self, validations: list[tuple[int, float]]) -> None:
        self.validations = validations

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validations.append((module.step, float(trainer.callback_metrics[NATS])))  # type: ignore[arg-type]


Outcome = tuple[list[tuple[int, float]], dict[str, Any], dict[str, Any]]


def outcome(folder: Path, where: str = "", killed: bool = False) -> Outcome:
    """Of a run of 8 steps, which may break off somewhere and be resumed: its validations and its two checkpoints."""
    validations: list[tuple[int, float]] = []
    for resume in (False, True) if where else (False,):
        module, data = make_prior_module(steps=8)
        callbacks = [*around(), Judge(validations)] + ([] if resume else [Break(where)])
        if killed:
            callbacks[4].on_exception = lambda *_: None
        run = make_trainer(val_every=3, callbacks=callbacks, default_root_dir=folder)
        failure = (
            pytest.raises(RuntimeError, match="the power failed")
            if where and not resume
            else nullcontext()
        )
        with failure:
            run.fit(module, data, ckpt_path=folder / LAST if resume else None)
    return (
        validations,
        read_checkpoint(folder / LAST, "prior"),
        read_checkpoint(folder / BEST, "prior"),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    "where", ["training 4", "validation 3.0", "validation 3.1", "validated 3.1", "after 6"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, whole: Outcome, where: str, killed: bool
) -> None:
    validations, last, best = whole
    validations_too, last_too, best_too = outcome(tmp_path, where, killed)
    if killed:  # a validation after which nothing was saved runs again
        validations_too = sorted(set(validations_too))
    assert validations_too == validations
    assert last_too["clock"]["step"] == 8
    assert last_too["callbacks"] == last["callbacks"]
    assert (best_too["lowest"], best_too["clock"]["step"]) == (
        best["lowest"],
        best["clock"]["step"],
    )
    for one, two in (
        (last["state_dict"], last_too["state_dict"]),
        (last["average"], last_too["average"]),
    ):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_average_of_a_prior_leaves_what_does_not_change_as_it_is() -> None:
    module, data = make_prior_module(steps=5)
    average, vectors = WeightAverage(0.9), module.model.read.vectors.clone()  # type: ignore[operator,union-attr]
    make_trainer(callbacks=[average]).fit(module, data)
    assert torch.equal(average.values["read.vectors"], vectors)
    assert not torch.equal(average.values["head.weight"], module.model.head.weight)  # type: ignore[arg-type]


def test_the_loss_map_is_black_where_codes_are_easiest_and_white_where_they_are_hardest(
    tmp_path: Path,
) -> None:
    module, data = make_prior_module()
    torch.nn.init.normal_(module.model.head.weight)  # type: ignore[arg-type]
    run = make_trainer(callbacks=[LossMapPictures()], default_root_dir=tmp_path)
    run.validate(module, data, verbose=False)
    with Image.open(tmp_path / "pictures/loss-map-000000.png") as opened:
        sheet = np.asarray(opened)[..., 0]
    side = sheet.shape[0] // GRID[0]
    assert sheet.shape == (side * GRID[0], side * GRID[1])
    assert side >= 64
    places = sheet[side // 2 :: side, side // 2 :: side].astype(float)
    expected = module.loss_map.numpy()
    np.testing.assert_allclose(
        places / 255, (expected - expected.min()) / np.ptp(expected), atol=0.003
    )
