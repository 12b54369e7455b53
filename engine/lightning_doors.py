"""What Lightning has no public seam for. Each door is one function; tests/engine/test_lightning_doors.py names the version."""

from types import SimpleNamespace
from typing import Any

import lightning as L


def logged_step(trainer: L.Trainer) -> int:
    """The step under which Lightning gives figures to the loggers, also those of a validation."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def align_logged_step(trainer: L.Trainer, step: int) -> None:
    """Make Lightning's count for the loggers, and for log_every_n_steps, equal to ours.

    After a resume it is ahead: a validation that Lightning skips counts as a step. Logging a metric called "step" would
    change the loggers' axis, but not which steps are logged.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def stand_in_loop() -> Any:
    """What stands in for a trainer's fit_loop where there is none: it has the count of the two functions above."""
    return SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))


def request_validation(checkpoint: dict[str, Any]) -> None:
    """Make Lightning run the validation that a checkpoint lacks, from its first batch, before it trains on.

    By itself it skips that validation, or takes half of it for the whole.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    for count in ("total", "current"):
        training = fit_loop["epoch_loop.batch_progress"][count]
        validation = fit_loop["epoch_loop.val_loop.batch_progress"][count]
        training["completed"] = training["processed"]
        validation.update(ready=1, started=1, processed=0, completed=0)  # within its first batch


def skip_sigterm_exchange(trainer: L.Trainer) -> None:
    """Drop Lightning's exchange between several processes before each batch, for which the host waits for the device.

    It spreads a SIGTERM of the main process; callbacks/signals.py takes that signal over and exchanges it about once a second.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    loop._broadcast_sigterm_tensor = lambda: None
