"""What a signal does to a run: it ends between two updates, saved, with an exit code that says so."""

import os
import signal
import threading
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback

from codegrid.engine.exit_codes import SIGNALS
from codegrid.engine.module import ClockedModule
from codegrid.engine.waits import ends_waits, waiting_since

GRACE = 10.0  # seconds that a run of several processes may wait for a batch after a signal


class Stop(SystemExit):
    """The end of a run that a signal asked for, between two updates or during validation: its state is complete."""


class StopNow(SystemExit):
    """The end of a run in the middle of an update: the last checkpoint has to do."""


class Signals(Callback):
    """During training and validation, Ctrl-C, SIGTERM and SIGUSR1 end the run after the current update, or at the next batch
    of a validation; the checkpoint callback then saves it. A second Ctrl-C ends it at once. While the run waits for a batch
    it ends at once, as complete as between two updates.

    Several processes agree on the moment, on GPUs about once a second, and at the end of training. Only the main one exits
    with the signal's code: if another one did, the launcher (Lightning, srun) would kill the main process while it saves. If
    one of them has waited for the same batch for `GRACE` seconds since the signal, the others wait for it within an update,
    and it ends without saving. If Lightning requeues SLURM jobs on SIGUSR1, its handler is called, between two updates as
    well. As a context manager, Signals gives all signals back to their earlier handlers, with one that came too late to end
    the run.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._moment = 0.0  # of the signal
        self._waits = ExitStack()
        self._trainer: L.Trainer | None = None
        self._handlers: dict[signal.Signals, Any] = {}  # as they were before
        self._requeue: Any = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # others can't have handlers
            self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._waits.enter_context(ends_waits(self.end_wait))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._waits.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None and self.received is not None:
            signal.raise_signal(self.received)  # the run is over; the rest of a sweep may not be

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.listen()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.listen()

    def listen(self) -> None:
        """Take over the signals, also from Lightning, which has set handlers of its own by now."""
        for number in self._handlers:
            handler = signal.getsignal(number)
            if handler == self.handle:
                continue
            if number == signal.SIGUSR1 and callable(handler):
                self._requeue = handler  # Lightning's, under SLURM
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; nothing else is safe in the middle of an update. While the run waits for a batch, end it."""
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise StopNow(SIGNALS[signal.SIGINT])
            message = b"\nthe run ends after this update and is saved; Ctrl-C again ends it now\n"
            os.write(2, message)
        if self.received is None:
            self._moment = time.monotonic()
        self.received = signal.Signals(number)
        if waiting_since() is not None:
            self.end_wait()

    def end_wait(self) -> None:
        """End the run if a signal was received; called when it begins to wait for a batch, while it waits, and by the signal."""
        self.listen()  # the first wait is before on_train_start
        if self.received is None or self._trainer is None:
            return
        if self._trainer.world_size > 1:
            # A signal before a long pause, such as a save, leaves the ranks time to agree after it.
            since = max(self._moment, waiting_since() or self._moment)
            if time.monotonic() - since > GRACE:
                raise StopNow(SIGNALS[self.received])
        elif self._requeue is None or self._trainer.training:
            self._end(SIGNALS[self.received])

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """End the run if a signal was received: between two updates, after the checkpoint callback's turn."""
        assert isinstance(module, ClockedModule)
        if trainer.world_size > 1 and not (module.ranks_meet and self._agree(trainer)):
            return
        if self.received is not None:
            self._end(SIGNALS[self.received] if trainer.is_global_zero else 0)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self._agree(trainer)  # or one rank alone would be ended by a signal of the last updates

    def _end(self, code: int) -> NoReturn:
        """End the run, which the checkpoint callback saves, after Lightning has requeued its job if it does."""
        if self.received == signal.SIGUSR1 and self._requeue is not None:
            self._requeue(self.received, None)
        raise Stop(code)

    def _agree(self, trainer: L.Trainer) -> bool:
        """Whether any rank has received a signal; all ranks then act on the same one."""
        reduce = trainer.strategy.reduce_boolean_decision
        if not reduce(self.received is not None, all=False):
            return False
        numbers = [number for number in SIGNALS if reduce(self.received == number, all=False)]
        self.received = numbers[0]
        return True

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: Any
    ) -> None:
        if self.received is not None and trainer.world_size == 1 and self._requeue is None:
            raise Stop(SIGNALS[self.received])
