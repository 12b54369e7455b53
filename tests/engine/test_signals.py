"""What a signal does to a run."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from engine.callbacks.checkpointing import Checkpoints
from engine.callbacks.signals import Signals, Stop, StopNow
from engine.checkpoint import make_header, read_checkpoint
from engine.exit_codes import SIGNALS
from engine.folder import LAST
from tests.helpers.configs import compose_plain
from tests.helpers.stage1 import fit, lightning_warnings, make_module

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


class Kick(Callback):
    """Sends a signal, some times, during the update after step 2; or during the validation after step 4."""

    def __init__(self, number: int, times: int = 1, validating: bool = False) -> None:
        self.number = number
        self.times = times
        self.validating = validating

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.kick(not self.validating and module.step == 2)  # type: ignore[arg-type]

    def on_validation_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.kick(self.validating)

    def kick(self, now: bool) -> None:
        while now and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)


def train(folder: Path, kick: Kick) -> None:
    """Train with the callbacks in the order of a run: the checkpoint callback's turn is before that of the signals."""
    checkpoints = Checkpoints(make_header("vqgan", compose_plain("stage=vqgan")), 100)
    with Signals() as signals:
        fit(make_module(), [checkpoints, signals, kick], default_root_dir=folder)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_current_update_is_finished_and_saved(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with pytest.raises(Stop) as stop:
        train(tmp_path, Kick(number))
    assert stop.value.code == 128 + number
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 3
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_validation_is_broken_off_and_marked_as_missing(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path, Kick(signal.SIGUSR1, validating=True))
    saved = read_checkpoint(tmp_path, "vqgan")
    assert (saved["clock"]["step"], saved["unjudged"]) == (4, True)


def test_a_second_ctrl_c_ends_the_run_at_once_without_saving(tmp_path: Path) -> None:
    with pytest.raises(StopNow) as stop:
        train(tmp_path, Kick(signal.SIGINT, times=2))
    assert stop.value.code == 130
    assert not (tmp_path / LAST).exists()


def test_lightning_requeues_a_slurm_job_between_two_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", calls.append)
    for name, value in (
        ("SLURM_NTASKS", "1"),
        ("SLURM_JOB_NAME", "run"),
        ("SLURM_JOB_ID", "7"),
        ("SLURM_LOCALID", "0"),
    ):
        monkeypatch.setenv(name, value)
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NODEID", "0"), ("SLURM_NODELIST", "here")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop) as stop:
        train(tmp_path, Kick(signal.SIGUSR1))
    assert stop.value.code == 138
    assert calls == [["scontrol", "requeue", "7"]]
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 3


@pytest.mark.parametrize(("is_main", "code"), [(True, 143), (False, 0)])
def test_only_the_main_one_of_several_processes_exits_with_the_signals_code(
    is_main: bool, code: int
) -> None:
    class Strategy:
        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            return decision

    class Trainer:
        world_size = 2
        is_global_zero = is_main
        strategy = Strategy()

    signals = Signals()
    module: Any = None
    signals.handle(signal.SIGTERM, None)
    with pytest.raises(Stop) as stop:
        signals.on_train_batch_start(Trainer(), module)  # type: ignore[arg-type]
    assert stop.value.code == code


def test_a_signal_that_comes_too_late_to_end_the_run_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signals.handle(signal.SIGINT, None)
