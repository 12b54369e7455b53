"""What a signal does to a run: it ends between two updates, saved, with a code that says so."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

CODES = {  # signal -> exit code, 128 + its number, as shells have it: no success, so that a scheduler starts the job again
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 128 + signal.SIGUSR1,
}


class Stop(SystemExit):
    """The end of a run that a signal has asked for, between two updates or in a validation: its state is whole."""


class StopNow(SystemExit):
    """The end of a run in the middle of whatever it does: what was saved before has to do."""


class Signals(Callback):
    """While training and validating: Ctrl-C, SIGTERM and SIGUSR1 end the run after the update that is being made, or in the
    middle of a validation; the checkpoint callback then saves it. A second Ctrl-C ends it at once.

    Several processes agree on the moment, and the first one alone ends with the signal's code: of another's, whoever watches
    over them (Lightning, srun) would kill the first while it saves. Where SLURM's jobs are put back into the queue by
    Lightning's handler of SIGUSR1, that handler is called, between two updates as well. As a context it gives all signals back
    to those who had them before, with one that came too late to end the run.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._requeue: Any = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # others can't have handlers
            self._before = {number: signal.getsignal(number) for number in CODES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None and self.asked is not None:
            signal.raise_signal(self.asked)  # the run is over; the rest of a sweep may not be

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.between not in data.between:
            data.between.append(self.between)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.listen()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.listen()

    def listen(self) -> None:
        """Take the signals over, also from Lightning, which has set handlers of its own by now."""
        for number in self._before:
            handler = signal.getsignal(number)
            if handler == self.handle:
                continue
            if number == signal.SIGUSR1 and callable(handler):
                self._requeue = handler  # Lightning's, under SLURM
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; nothing else is safe in the middle of an update."""
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                raise StopNow(CODES[signal.SIGINT])
            os.write(
                2, b"\nthe run ends after this update, and is saved; Ctrl-C again ends it now\n"
            )
        self.asked = signal.Signals(number)

    def between(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:  # not all may have it, or not at the same update
            if not trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False):
                return
            numbers = [
                number
                for number in CODES
                if trainer.strategy.reduce_boolean_decision(self.asked == number, all=False)
            ]
            self.asked = numbers[0]
        if self.asked is not None:
            if self.asked == signal.SIGUSR1 and self._requeue is not None:
                self._requeue(self.asked, None)
            raise Stop(CODES[self.asked] if trainer.is_global_zero else 0)

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: Any
    ) -> None:
        if self.asked is not None and trainer.world_size == 1 and self._requeue is None:
            raise Stop(CODES[self.asked])
