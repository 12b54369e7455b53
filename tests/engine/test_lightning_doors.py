"""The behaviour of Lightning that engine/lightning_doors.py relies on, which no documented interface promises."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from packaging.version import Version

from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.folder import LAST
from codegrid.engine.lightning_doors import (
    align_logged_step,
    logged_step,
    request_validation,
    skip_sigterm_exchange,
    stand_in_loop,
)
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings

HEADER = {"format": 1, "stage": "vqgan", "config": {}}


def test_the_doors_were_checked_with_lightning_2_6() -> None:
    """Read the loops of a newer version before raising the range: engine/lightning_doors.py sets their counters."""
    assert Version("2.6") <= Version(L.__version__) < Version("2.7")


class LoggedSteps(Logger):
    """The step of each call of log_metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    name = "steps"
    version = 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("train/") for name in metrics):
            self.steps.append(step)


class AlignAt(Callback):
    """Moves Lightning's count to `step` before the first update, and records the count in each batch."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.counts: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            align_logged_step(trainer, self.step)
        self.counts.append(logged_step(trainer))


def fit_logged(*callbacks: Callback, log_every: int = 1) -> LoggedSteps:
    logged = LoggedSteps()
    trainer = L.Trainer(
        max_epochs=-1, accelerator="cpu", logger=logged, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=list(callbacks), log_every_n_steps=log_every,
    )  # fmt: skip

    trainer.fit(make_module(steps=6), make_noise())
    return logged


def test_the_logged_step_counts_batches_and_is_the_loggers_axis() -> None:
    align = AlignAt(0)
    logged = fit_logged(align)
    assert align.counts == list(range(6))
    assert logged.steps == list(range(6))


def test_an_aligned_step_moves_the_loggers_axis() -> None:
    align = AlignAt(40)
    logged = fit_logged(align)
    assert align.counts == list(range(40, 46))
    assert logged.steps == list(range(40, 46))


def test_an_aligned_step_decides_which_steps_are_logged() -> None:
    assert fit_logged(AlignAt(1), log_every=3).steps == [2, 5, 6]  # every third, and the last


def test_a_stand_in_has_the_count_too() -> None:
    trainer: Any = SimpleNamespace(fit_loop=stand_in_loop())
    assert logged_step(trainer) == 0
    align_logged_step(trainer, 7)
    assert logged_step(trainer) == 7


class ValidationBatches(Callback):
    """The step and the batch of each validation batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.batches.append((module.step, batch_idx))  # type: ignore[arg-type]


class BreakOff(Callback):
    """Ends the run in the second batch of the first validation, at step 4."""

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 1:
            raise RuntimeError("broken off")


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The folder of a run whose last checkpoint was written in the middle of the validation of step 4."""
    with pytest.raises(RuntimeError, match="broken off"):
        fit(make_module(), [Checkpoints(HEADER, 100), BreakOff()], default_root_dir=tmp_path)
    return tmp_path


class ValidatedSteps(LoggedSteps):
    """The step of each call of log_metrics with figures of a validation."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("val/") for name in metrics):
            self.steps.append(step)


def resume(folder: Path, *callbacks: Callback, logger: Logger | bool = False) -> list[int]:
    """The validation batches of step 4 in the resumed run, which saves after every second update."""
    validations = ValidationBatches()

    trainer = L.Trainer(
        max_epochs=-1, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=4, check_val_every_n_epoch=1, num_sanity_val_steps=0,
        callbacks=[*callbacks, Checkpoints(HEADER, 2), validations], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(make_module(), make_noise(), ckpt_path=folder / LAST)
    return [batch for step, batch in validations.batches if step == 4]


def test_a_requested_validation_is_run_whole(interrupted: Path) -> None:
    batches = resume(interrupted)
    assert batches == list(range(len(batches)))
    assert len(batches) > 1


class BreakOffAt(Callback):
    """Ends the run before the update that would follow `step` updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if module.step == self.step:
            raise RuntimeError("broken off")


def test_a_validation_is_logged_under_the_same_step_after_a_run_is_resumed_twice(
    tmp_path: Path,
) -> None:
    """Lightning counts a batch twice that was about to start when a checkpoint was written, and its logged step depends on it."""
    whole, resumed = ValidatedSteps(), ValidatedSteps()
    fit(make_module(), [Checkpoints(HEADER, 2)], default_root_dir=tmp_path / "whole", logger=whole)
    folder = tmp_path / "interrupted"
    with pytest.raises(RuntimeError, match="broken off"):
        fit(make_module(), [Checkpoints(HEADER, 2), BreakOffAt(2)], default_root_dir=folder)
    with pytest.raises(RuntimeError, match="broken off"):
        resume(folder, BreakOff())
    resume(folder, logger=resumed)
    assert whole.steps == [3, 7]
    assert resumed.steps == whole.steps


def test_lightning_by_itself_still_skips_a_part_of_a_validation_that_broke_off(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, request_validation is no longer needed."""
    monkeypatch.setattr(
        "codegrid.engine.callbacks.checkpointing.request_validation", lambda checkpoint: None
    )
    batches = resume(interrupted)
    assert batches[:1] != [0]


def test_a_checkpoint_has_the_counters_that_request_validation_sets(interrupted: Path) -> None:
    checkpoint = torch.load(interrupted / LAST, weights_only=True)
    request_validation(checkpoint)
    loop = checkpoint["loops"]["fit_loop"]
    counts = {"ready", "started", "processed", "completed"}
    assert set(loop["epoch_loop.batch_progress"]["current"]) == counts
    assert set(loop["epoch_loop.val_loop.batch_progress"]["current"]) == counts


def test_lightning_exchanges_a_sigterm_before_each_batch_of_several_processes_unless_that_is_off() -> (
    None
):
    trainer = fit(make_module(steps=1))
    loop: Any = trainer.fit_loop.epoch_loop
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(loop.advance)
    assert "sigterm_tensor.item()" in inspect.getsource(loop._broadcast_sigterm_tensor)
    skip_sigterm_exchange(trainer)
    assert loop._broadcast_sigterm_tensor() is None
