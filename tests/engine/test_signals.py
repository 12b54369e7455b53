"""Who gets a signal, and what becomes of the run."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from engine.callbacks.checkpointing import Checkpoints
from engine.callbacks.signals import Signals, Stop, StopNow
from engine.checkpoint import LAST, make_header, read_checkpoint
from engine.exit_codes import SIGNALS
from tests.helpers.configs import compose_config
from tests.helpers.stage1 import fit, lightning_warnings, make_module

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


class Kick(Callback):
    """Sends a signal, some times, in the middle of the update after step 2; or in the validation after step 4."""

    def __init__(self, number: int, times: int = 1, validating: bool = False) -> None:
        self.number, self.times, self.validating = number, times, validating

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.kick(not self.validating and module.step == 2)  # type: ignore[arg-type]

    def on_validation_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.kick(self.validating)

    def kick(self, now: bool) -> None:
        while now and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)


def told(folder: Path, kick: Kick) -> None:
    checkpoints = Checkpoints(folder, make_header("vqgan", compose_config("stage=vqgan")), 100)
    with Signals() as signals:
        fit(make_module(), [checkpoints, kick, signals])


@pytest.mark.parametrize("number", SIGNALS)
def test_the_update_that_is_being_made_is_finished_and_saved(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with pytest.raises(Stop) as stop:
        told(tmp_path, Kick(number))
    assert stop.value.code == 128 + number
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 3
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_validation_is_not_waited_for_and_made_up_for_later(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        told(tmp_path, Kick(signal.SIGUSR1, validating=True))
    saved = read_checkpoint(tmp_path, "vqgan")
    assert (saved["clock"]["step"], saved["unjudged"]) == (4, True)


def test_ctrl_c_twice_stops_now_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StopNow) as stop:
        told(tmp_path, Kick(signal.SIGINT, times=2))
    assert stop.value.code == 130
    assert not (tmp_path / LAST).exists()


def test_slurms_requeueing_is_lightnings_and_happens_between_two_updates(
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
        told(tmp_path, Kick(signal.SIGUSR1))
    assert stop.value.code == 138
    assert calls == [["scontrol", "requeue", "7"]]
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 3


@pytest.mark.parametrize(("first", "code"), [(True, 143), (False, 0)])
def test_of_several_processes_the_first_alone_ends_with_the_signals_code(
    first: bool, code: int
) -> None:
    class Strategy:
        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            return decision

    class Trainer:
        world_size, is_global_zero, strategy = 2, first, Strategy()

    signals = Signals()
    signals.handle(signal.SIGTERM, None)
    with pytest.raises(Stop) as stop:
        signals.between(Trainer())  # type: ignore[arg-type]
    assert stop.value.code == code


def test_a_signal_that_comes_too_late_to_end_the_run_is_handed_on() -> None:
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signals.handle(signal.SIGINT, None)
