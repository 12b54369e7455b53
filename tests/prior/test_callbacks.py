"""The callbacks of a prior's training: best weights, doctor, early stopping, loss map; and resuming with all of them."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from PIL import Image

from codegrid.data.pixels import PixelRules
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.callbacks.alarms import Sign
from codegrid.engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.checkpoint import AVERAGE, read_checkpoint, substate
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.errors import InputError
from codegrid.engine.folder import BEST, DOCTOR, LAST, PICTURES
from prior.callbacks import LossMapPictures, PriorDoctor, SamplePictures
from prior.module import PriorModule
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
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


def make_callbacks(patience: int = 10, decay: float = 0.9) -> list[Any]:
    """The callbacks of stage=prior, in their order."""
    return [
        BestCheckpoint(ABOUT, NATS),
        WeightAverage(decay),
        make(PriorDoctor, every=5),
        EarlyStopping(NATS, patience=patience),
        Checkpoints(ABOUT, 3),
    ]


def make_overfitting(steps: int) -> tuple[PriorModule, CodeDataModule]:
    """A prior that can memorise its 30 grids."""
    torch.manual_seed(0)
    model = make_gpt()
    data = CodeDataModule(make_codes(30, 0), make_codes(60, 1), batch_size=15, seed=0)
    return PriorModule(
        model,
        lambda p: torch.optim.AdamW(p, 1e-2),
        Budget(steps),
        Schedule(5, floor=0.02),
        **LABEL_SETTINGS,
    ), data


@dataclass
class Overfit:
    """A run that overfits, and its folder."""

    module: PriorModule
    best: BestCheckpoint
    doctor: PriorDoctor
    folder: Path


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory) -> Overfit:
    folder = tmp_path_factory.mktemp("overfit")
    module, data = make_overfitting(400)
    callbacks = make_callbacks(patience=6)
    make_trainer(val_every=10, callbacks=callbacks, default_root_dir=folder).fit(module, data)
    return Overfit(module, callbacks[0], callbacks[2], folder)


def test_overfitting_is_reported_once_and_with_a_remedy(overfit: Overfit) -> None:
    [alarm] = overfit.doctor.alarms
    assert f"at step {overfit.best.step}, while training went from" in alarm
    assert "the prior over-fits" in alarm
    assert "try prior.dropout=0.1 prior.token_dropout=0.1" in alarm
    assert (overfit.folder / DOCTOR).read_text() == alarm + "\n"


def test_a_run_ends_when_its_validations_have_not_improved_for_some_time(overfit: Overfit) -> None:
    assert overfit.module.step == overfit.best.step + 6 * 10
    assert read_checkpoint(overfit.folder / LAST, "prior")["clock"]["step"] == overfit.module.step


def test_the_best_checkpoint_holds_the_weights_that_validation_used(overfit: Overfit) -> None:
    best = read_checkpoint(overfit.folder, "prior")
    module, data = make_overfitting(1)
    module.model.load_state_dict(substate(best["state_dict"], "model"))
    [figures] = make_trainer().validate(module, data, verbose=False)
    assert figures[NATS] == best["lowest"] == overfit.best.lowest
    assert {
        name: round(figures[f"val/{name}"], 4) for name in best["figures"]
    } == overfit.best.figures
    [last] = make_trainer().validate(overfit.module, data, verbose=False)
    assert last[NATS] > figures[NATS] + 0.05


def test_a_resumed_run_knows_its_best_checkpoint(overfit: Overfit) -> None:
    resumed = BestCheckpoint(ABOUT, NATS)
    resumed.setup(make_trainer(default_root_dir=overfit.folder), overfit.module, "fit")
    assert (resumed.lowest, resumed.step, resumed.figures) == (
        overfit.best.lowest,
        overfit.best.step,
        overfit.best.figures,
    )


def test_neither_equal_nor_broken_weights_replace_the_best(tmp_path: Path) -> None:
    module, data = make_prior_module(steps=4, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    best = BestCheckpoint(ABOUT, NATS)
    make_trainer(val_every=2, callbacks=[best], default_root_dir=tmp_path).fit(module, data)
    assert best.step == 2  # an equal figure is not better
    torch.nn.init.constant_(module.model.head.weight, torch.nan)
    make_trainer(callbacks=[best], default_root_dir=tmp_path).validate(module, data, verbose=False)
    assert read_checkpoint(tmp_path / BEST, "prior")["clock"]["step"] == 2


FALLS = [(3.0, 3.0), (2.0, 1.9), (1.5, 1.2)]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([(1.4, 1.0)], []),
        ([(1.505, 1.1)], []),  # within the margin
        ([(1.6, 1.3)], []),  # training is worse too: noise, or too high a learning rate
        ([(1.6, 1.1)], ["overfitting"]),
        ([(1.6, 1.1), (1.4, 1.0)], []),
    ],
)
def test_overfitting_means_that_validation_rises_while_training_falls(
    more: list[tuple[float, float]], expected: list[str]
) -> None:
    doctor = make(PriorDoctor, margin=0.01)
    module, _ = make_prior_module()
    for pair in FALLS + more:
        names = [sign.name for sign in doctor.signs(module, *pair)]
    assert names == expected


@pytest.mark.parametrize(
    ("unigram", "nats", "expected"),
    [
        (0.0, 0.002, []),  # a single code: there is nothing to learn
        (0.0, 0.0, []),
        (1.5, 1.6, ["blind"]),
        (1.5, 1.4, []),
        (1.5, math.nan, []),
    ],
)
def test_a_prior_of_a_single_code_is_not_called_blind(
    unigram: float, nats: float, expected: list[str]
) -> None:
    doctor = make(PriorDoctor, late=0.0)
    doctor.unigram = unigram
    module, _ = make_prior_module()
    assert [sign.name for sign in doctor.signs(module, nats, nats)] == expected


def test_a_prior_that_learns_no_dependence_between_codes_is_reported(tmp_path: Path) -> None:
    module, data = make_prior_module(steps=10, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    doctor = make(PriorDoctor, patience=2, late=0.5)
    make_trainer(val_every=2, callbacks=[doctor], default_root_dir=tmp_path).fit(module, data)
    [alarm] = doctor.alarms
    assert alarm.startswith(
        "step 8: the prior has learned nothing of how codes go together: it takes 1.792 nats per token"
    )


def test_a_nan_loss_ends_the_run(tmp_path: Path) -> None:
    class BreakWeights(Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 7:
                module.model.head.weight.data[0] = float("nan")  # type: ignore[union-attr,index,operator]

    module, data = make_prior_module(steps=40)
    with pytest.raises(InputError, match="since step 7"):
        make_trainer(
            callbacks=[BreakWeights(), make(PriorDoctor, every=5)], default_root_dir=tmp_path
        ).fit(module, data)
    assert module.step == 10


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 0}, {"margin": -1}, {"late": 2}])
def test_impossible_settings_of_the_doctor_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"callbacks.doctor."):
        make(PriorDoctor, **wrong)


class Break(Callback):
    """The run breaks off at a step: in training, in a validation or after one."""

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


class Validations(Callback):
    """The step and the figure of each validation."""

    def __init__(self, series: list[tuple[int, float]]) -> None:
        self.series = series

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.series.append((module.step, float(trainer.callback_metrics[NATS])))  # type: ignore[arg-type]


# validations, last checkpoint, best checkpoint
Outcome = tuple[list[tuple[int, float]], dict[str, Any], dict[str, Any]]


def train(folder: Path, where: str = "", killed: bool = False) -> Outcome:
    """A run of 8 steps, which may break off somewhere and is then resumed; if `killed`, without a last save."""
    series: list[tuple[int, float]] = []
    for resume in (False, True) if where else (False,):
        module, data = make_prior_module(steps=8)
        callbacks = [*make_callbacks(), Validations(series)] + ([] if resume else [Break(where)])
        if killed:
            callbacks[4].on_exception = lambda *_: None
        trainer = make_trainer(val_every=3, callbacks=callbacks, default_root_dir=folder)
        failure = (
            pytest.raises(RuntimeError, match="the power failed")
            if where and not resume
            else nullcontext()
        )
        with failure:
            trainer.fit(module, data, ckpt_path=folder / LAST if resume else None)
    return series, read_checkpoint(folder / LAST, "prior"), read_checkpoint(folder / BEST, "prior")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    "where", ["training 4", "validation 3.0", "validation 3.1", "validated 3.1", "after 6"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, whole: Outcome, where: str, killed: bool
) -> None:
    series, last, best = whole
    resumed_series, resumed_last, resumed_best = train(tmp_path, where, killed)
    if killed:  # a validation after the last save is repeated
        resumed_series = sorted(set(resumed_series))
    assert resumed_series == series
    assert resumed_last["clock"]["step"] == 8
    assert resumed_last["callbacks"] == last["callbacks"]
    assert resumed_best["lowest"] == best["lowest"]
    assert resumed_best["clock"]["step"] == best["clock"]["step"]
    for key in ("state_dict", AVERAGE):
        assert resumed_last[key].keys() == last[key].keys()
        for name, value in last[key].items():
            assert torch.equal(resumed_last[key][name], value), name


def test_the_average_of_a_constant_buffer_equals_it_to_the_bit() -> None:
    module, data = make_prior_module(steps=5)
    average = WeightAverage(0.9)
    vectors = module.model.read.vectors.clone()  # type: ignore[operator,union-attr]
    make_trainer(callbacks=[average]).fit(module, data)
    assert torch.equal(average.values["read.vectors"], vectors)
    assert not torch.equal(average.values["head.weight"], module.model.head.weight)  # type: ignore[arg-type]


def test_the_loss_map_is_black_where_codes_are_easiest_and_white_where_they_are_hardest(
    tmp_path: Path,
) -> None:
    module, data = make_prior_module()
    torch.nn.init.normal_(module.model.head.weight)  # type: ignore[arg-type]
    make_trainer(callbacks=[LossMapPictures()], default_root_dir=tmp_path).validate(
        module, data, verbose=False
    )
    with Image.open(tmp_path / PICTURES / "loss-map-000000.png") as opened:
        sheet = np.asarray(opened)[..., 0]
    side = sheet.shape[0] // GRID[0]
    assert sheet.shape == (side * GRID[0], side * GRID[1])
    assert side >= 64
    places = sheet[side // 2 :: side, side // 2 :: side].astype(float)
    expected = module.loss_map.numpy()
    np.testing.assert_allclose(
        places / 255, (expected - expected.min()) / np.ptp(expected), atol=0.003
    )


def test_samples_of_bands_and_rectangles_are_pictures_of_the_shown_channels(tmp_path: Path) -> None:
    """What is drawn has one bright band, the fifth, which is shown as green."""
    module, data = make_prior_module()
    tokenizer = make_tokenizer((12, 24), (3, 6), channels=5).eval()
    tokenizer.rules = PixelRules((0, 4095), depth=16, show=(2, 5, 1))
    bright = torch.tensor([-1.0, -1.0, -1.0, -1.0, 1.0])[:, None, None].expand(5, 12, 24)
    tokenizer.decode_indices = lambda codes: bright.expand(len(codes), -1, -1, -1)  # type: ignore[method-assign]
    pictures = SamplePictures(tokenizer, n=4, rows=2)
    make_trainer(callbacks=[pictures], default_root_dir=tmp_path).validate(
        module, data, verbose=False
    )
    with Image.open(tmp_path / PICTURES / "samples-000000.png") as opened:
        sheet = np.asarray(opened)[::2, ::2]
    assert sheet.shape == (2 * 14 - 2, 4 * 26 - 2, 3)
    assert (sheet[:12, :24] == [0, 255, 0]).all()
    assert (sheet[12:14] == 255).all()


def test_a_validation_that_a_resumed_run_repeats_is_no_new_sign_of_trouble() -> None:
    doctor, trainer, sign = make(PriorDoctor), Any, Sign("blind", "it learns nothing", "more steps")
    for step in (5, 10, 10):
        module: Any = SimpleNamespace(step=step)
        doctor.look(trainer, module, [sign])  # type: ignore[arg-type]
    assert doctor.state_dict()["signs"] == {"blind": (0, 2)}
