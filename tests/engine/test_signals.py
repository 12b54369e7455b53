"""Signals end a run between two updates, saved."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import get_worker_info

from codegrid.data.form import Form
from codegrid.data.source import Source
from codegrid.engine.callbacks import signals as signals_module
from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.callbacks.signals import Signals, Stop, StopNow
from codegrid.engine.checkpoint import make_header, read_checkpoint
from codegrid.engine.exit_codes import SIGNALS
from codegrid.engine.folder import LAST
from codegrid.engine.waits import interruptible_wait
from tests.helpers.configs import compose_plain
from tests.helpers.stage1 import Noise, fit, lightning_warnings, make_module

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


class Kick(Callback):
    """Sends a signal `times` times during the update after step 2, or during the validation after step 4."""

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
    """Train with the callbacks in the order of a run: the checkpoint callback comes before the signals."""
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
def test_only_the_main_process_exits_with_the_code_of_the_signal(is_main: bool, code: int) -> None:
    class Strategy:
        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            return decision

    class Trainer:
        world_size = 2
        is_global_zero = is_main
        strategy = Strategy()

    signals = Signals()
    module = make_module()
    signals.handle(signal.SIGTERM, None)
    with pytest.raises(Stop) as stop:
        signals.on_train_batch_start(Trainer(), module)  # type: ignore[arg-type]
    assert stop.value.code == code


def test_a_signal_that_comes_too_late_to_end_the_run_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signals.handle(signal.SIGINT, None)


class Stuck(Source):
    """Images of which the one after `readable` hangs, as on a disk that is gone; the program gets a signal then."""

    checked_up_front = False

    def __init__(self, readable: int, number: int, delay: float) -> None:
        super().__init__(24, "stuck")
        self.readable = readable
        self.number = number
        self.delay = delay

    def read_image(self, index: int, form: Form) -> tuple[Any, int]:
        self.readable -= 1
        if self.readable < 0:
            program = os.getppid() if get_worker_info() else os.getpid()
            threading.Timer(self.delay, os.kill, (program, self.number)).start()
            time.sleep(600)
        return np.full(form.shape, index, np.uint8), 0


class StuckImages(Noise):
    def __init__(self, sources: dict[str, Source], num_workers: int) -> None:
        super().__init__(16, cache="none", batch_size=4, num_workers=num_workers)
        self.stuck = sources

    def open_source(self, split: str) -> Source:
        return self.stuck[split]


def train_stuck(folder: Path, images: StuckImages) -> float:
    """Train until a signal ends the run; the seconds from the start."""
    checkpoints = Checkpoints(make_header("vqgan", compose_plain("stage=vqgan")), 100)
    start = time.monotonic()
    with pytest.raises(Stop), Signals() as signals:
        fit(make_module(), [checkpoints, signals], images, default_root_dir=folder)
    return time.monotonic() - start


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_waits_for_a_batch_ends_at_once_and_is_saved(
    tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    images = StuckImages({"train": Stuck(16, number, 0.4), "val": Stuck(99, number, 0)}, workers)
    assert train_stuck(tmp_path, images) < 8
    # The fifth batch is awaited before the fourth update, since Lightning fetches one ahead.
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 3
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_wait_for_the_first_batch_ends_too(tmp_path: Path) -> None:
    images = StuckImages({"train": Stuck(0, signal.SIGTERM, 0.2), "val": Stuck(99, 0, 0)}, 0)
    assert train_stuck(tmp_path, images) < 8
    assert not (tmp_path / LAST).exists(), "there is nothing to save"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_in_a_validation_ends_too_and_the_validation_is_marked_as_missing(
    tmp_path: Path, workers: int
) -> None:
    images = StuckImages({"train": Stuck(999, 0, 0), "val": Stuck(6, signal.SIGTERM, 0.4)}, workers)
    assert train_stuck(tmp_path, images) < 8
    saved = read_checkpoint(tmp_path, "vqgan")
    assert (saved["clock"]["step"], saved["unjudged"]) == (4, True)


def test_one_of_several_processes_waits_some_seconds_more_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Trainer:
        world_size = 2
        training = True

    with Signals() as signals:
        signals.setup(Trainer(), None, "fit")  # type: ignore[arg-type]
        with interruptible_wait():
            signals.handle(signal.SIGTERM, None)
            signals.end_wait()  # the others may wait for this process in the middle of an update
            monkeypatch.setattr(signals_module, "GRACE", -1.0)
            with pytest.raises(StopNow) as stop:
                signals.end_wait()
        assert stop.value.code == 143
        signals.received = None


def test_a_signal_before_a_long_pause_does_not_end_the_next_wait_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Trainer:
        world_size = 2
        training = True

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Signals() as signals:
        signals.setup(Trainer(), None, "fit")  # type: ignore[arg-type]
        signals.handle(signal.SIGTERM, None)
        now[0] += 60  # a save; the ranks agree on the signal at one of the next updates
        for _ in range(5):
            with interruptible_wait():
                now[0] += signals_module.GRACE - 1
                signals.end_wait()
        with pytest.raises(StopNow), interruptible_wait():
            now[0] += signals_module.GRACE + 1
            signals.end_wait()
        signals.received = None
