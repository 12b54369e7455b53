"""When a run's checkpoints are written, and what is restored from one."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from codegrid.engine.callbacks.signals import Stop, StopNow
from codegrid.engine.checkpoint import find_damage, read_checkpoint, save_atomically
from codegrid.engine.collectives import all_gather, own_entry, run_on_main
from codegrid.engine.console import best_effort_write, log_line
from codegrid.engine.errors import InputError
from codegrid.engine.folder import BEST, LAST
from codegrid.engine.lightning_doors import align_logged_step, request_validation
from codegrid.engine.loggers import truncate_logs
from codegrid.engine.module import ClockedModule
from codegrid.engine.writer import AtomicCheckpointIO

# What a run does after a save that failed.
TRIES_AGAIN = "The run continues and tries again at the next checkpoint"
SAVES_AT_END = "The run ends and saves its last state"
ENDS_UNSAVED = "The run ends without another try"

PAUSES = (10, 30, 60, 120, 240)  # seconds between attempts to write the last state of a run


class Checkpoints(Callback):
    """Writes checkpoints/last.ckpt every `every` updates, at the end, and when a run breaks off between two updates; the file
    before is kept as previous.ckpt.

    A checkpoint is of a whole update, after its logs and its validation, so a resumed run repeats nothing and skips
    nothing; files that the run appends to are truncated to the checkpoint's step. It also holds the state of the random
    streams, which Lightning leaves out, and the run's header. If a run breaks off during a validation, the resumed run
    repeats that validation from its start.

    Under trainer.save_async training continues while a thread writes. The next checkpoint, the end of the run and whatever
    breaks it off wait for that write, so there is one at a time.

    If a checkpoint can't be written, the run reports it, continues, and tries again at the next one. At the end of the run
    it retries for some minutes, then writes to the system's folder for temporary files, and fails with a sentence.
    """

    def __init__(
        self, header: Mapping[str, Any], every: int, pauses: Sequence[float] = PAUSES
    ) -> None:
        self.header = dict(header)
        self.every = every
        self.pauses = pauses
        self._random: list[dict[str, Any]] = []  # random states of each rank
        self._validation_due = False  # whether the loaded checkpoint lacks its validation
        self._logged: dict[str, float] = {}
        self._validated = 0  # the step of the last complete validation
        self._saved = (0, 0)  # the step of the last save, and the last validation then
        self._written = (0, 0)  # the same of the last save that is on the disk
        self._is_pending = (
            False  # whether the last save may be under way, and its outcome is unknown
        )
        self._training = False

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.file = Path(trainer.default_root_dir) / LAST
        if not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(is_async=False)

    # Writing.

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Save if it is time: this is after an update with its logs and its validation, and before the next."""
        assert isinstance(module, ClockedModule)
        align_logged_step(trainer, module.step)
        if trainer.world_size == 1 and not writer_of(trainer).is_writing:
            self.settle(trainer, TRIES_AGAIN)  # at once; several ranks meet at the next save
        self.save_if_due(trainer)
        if (
            self._logged
        ):  # a figure that is not logged at every step keeps its last value in the logs
            module.log_dict(self._logged)
            self._logged = {}

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save before the validation too, which may take long, and log it under the update that it follows."""
        if trainer.state.fn != "fit":
            return
        assert isinstance(module, ClockedModule)
        align_logged_step(trainer, module.step - 1)  # Lightning counts on where a run resumes here
        if not trainer.should_stop:
            self.save_if_due(trainer)

    def save_if_due(self, trainer: L.Trainer) -> None:
        """Save every `every` updates; if the disk refuses, report it and continue."""
        module = trainer.lightning_module
        assert isinstance(module, ClockedModule)
        is_saved = (module.step, self._validated) == self._saved
        if module.step % self.every or is_saved or not module.step:
            return
        try:
            self.save(trainer, TRIES_AGAIN, waits=not writer_of(trainer).is_async)
        except OSError as error:
            self.report(error, module.step, TRIES_AGAIN)

    def save(self, trainer: L.Trainer, outlook: str, waits: bool = True) -> None:
        """Save the state as it is, after the save before, which is reported with the `outlook` if it failed. Raises OSError on
        all ranks if it `waits` and the file can't be written: each has a part in it, and all must agree on the next try."""
        module = trainer.lightning_module
        assert isinstance(module, ClockedModule)
        module.check()  # a broken model must not replace a good one
        self.settle(trainer, outlook)  # before the state is gathered, or memory would hold two
        self._is_pending = True
        trainer.save_checkpoint(self.file)
        self._saved = (module.step, self._validated)
        if waits and (error := self.wait(trainer)):
            raise error

    def settle(self, trainer: L.Trainer, outlook: str) -> None:
        """Wait for the save under way, and report it with the `outlook` if it failed. All ranks must call it."""
        step, _ = self._saved
        if error := self.wait(trainer):
            self.report(error, step, outlook)

    def wait(self, trainer: L.Trainer) -> OSError | None:
        """Wait for the save under way; its error if it failed, on all ranks, which must all call it."""
        if not self._is_pending:
            return None
        saved, self._saved = (
            self._saved,
            self._written,
        )  # also if something else than the disk fails
        self._is_pending = False
        error = run_on_main(lambda: writer_of(trainer).take_error(self.file))
        if error is None:
            self._saved = self._written = saved
        return error

    def report(self, error: OSError, step: int, outlook: str) -> None:
        """Print that the checkpoint of this step can't be written, and the outlook: what the run does now."""
        last = self._written[0]
        before = f"the last one is of step {last}" if last else "there is none yet"
        log_line(
            f"step {step}: {self.file} can't be written ({error.strerror or error}); {before}. {outlook}"
        )

    def save_finally(self, trainer: L.Trainer, pauses: Sequence[float]) -> None:
        """Save what would otherwise be lost with this process: retry after each of the pauses, then write elsewhere."""
        for pause in (*pauses, None):
            try:
                return self.save(trainer, SAVES_AT_END)
            except OSError as error:
                reason = f"{self.file} can't be written ({error.strerror or error})"
            if pause is not None:
                log_line(
                    f"{reason}; the run is over and its state still in memory: next try in {pause:g} s"
                )
                time.sleep(pause)
        intended = self.file
        run_id = self.header["config"].get("id")
        self.file = Path(tempfile.gettempdir()) / f"codegrid-{run_id}" / LAST
        try:
            self.save(trainer, SAVES_AT_END)
        except OSError as error:
            raise InputError(
                f"{reason}, nor can {self.file} ({error.strerror or error}); "
                "the run's last state is lost"
            ) from error
        finally:
            elsewhere, self.file = self.file, intended
        raise InputError(
            f"{reason}; the run's last state is in {elsewhere}: "
            f"move it to {intended}, and resume with resume="
        )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        align_logged_step(trainer, module.step)
        self.save_finally(trainer, self.pauses)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(module, ClockedModule)
        is_whole = not module.is_updating and module.broken < 0
        alone = trainer.world_size == 1 and not isinstance(exception, StopNow)
        together = isinstance(exception, Stop) or alone  # else other ranks may not be here
        if not (self._training and is_whole and together and trainer.state.fn == "fit"):
            self.finish_alone(trainer)
            return
        self.settle(trainer, SAVES_AT_END)
        if module.step > 0 and (module.step, self._validated) != self._saved:
            self.save_finally(trainer, ())  # whoever ends a program has little patience

    def finish_alone(self, trainer: L.Trainer) -> None:
        """Wait for the save under way without the other ranks, and report it if it failed."""
        writer = writer_of(trainer)
        if writer.is_writing:
            log_line("a checkpoint is being written; the run ends when it is on the disk")
        writer.finish()
        if self._is_pending and (error := writer.take_error(self.file)):
            self.report(error, self._saved[0], ENDS_UNSAVED)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        self._validated = module.step

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(module, ClockedModule)
        is_validation_step = module.step % (trainer.val_check_batch or math.inf) == 0
        checkpoint["codegrid"] = self.header
        checkpoint["unjudged"] = is_validation_step and self._validated != module.step
        checkpoint["logged"] = {
            name: float(value)
            for name, value in trainer.logged_metrics.items()
            if name.startswith("train/")
        }
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        own = {"cpu": torch.get_rng_state(), "cuda": cuda}
        checkpoint["random"] = all_gather(own)  # every rank has its own streams

    # Restoring.

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        step = checkpoint["clock"]["step"]
        self._random = checkpoint["random"]
        self._validation_due = bool(checkpoint.get("unjudged"))
        self._logged = checkpoint.get("logged", {})
        self._validated = 0 if self._validation_due else step
        self._saved = self._written = (step, self._validated)
        if self._validation_due:
            request_validation(checkpoint)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        self._training = True
        if not self._random:
            return
        truncate_logs(trainer.loggers, module.step, self._validation_due)
        own = own_entry(self._random, {})
        if own:  # else this rank is new, and has random numbers that no other rank has
            torch.set_rng_state(own["cpu"])  # as late as possible: loaders and validation draw too
            if own["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"])


class BestCheckpoint(Callback):
    """Keeps the weights with the lowest `figure` of all validations in checkpoints/best.ckpt.

    `figures` are all figures of that validation, and `step` is when it was. The weights are those that validation used, so
    this callback goes before the one that takes an average out again. A resumed run continues with the file it has.
    """

    def __init__(self, header: Mapping[str, Any], figure: str) -> None:
        self.header = dict(header)
        self.figure = figure
        self.lowest = math.inf
        self.step = 0
        self.figures: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.file = Path(trainer.default_root_dir) / BEST
        if stage != "fit" or not self.file.is_file():
            return
        if damage := find_damage(self.file):
            log_line(f"{self.file} is damaged ({damage}): the next validation starts a new best")
            return
        best = read_checkpoint(self.file, self.header["stage"])
        self.lowest = best["lowest"]
        self.step = best["clock"]["step"]
        self.figures = best["figures"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        value = figures[self.figure]
        if value >= self.lowest or not math.isfinite(value):
            return
        self.lowest = value
        self.step = module.step
        self.figures = {name.removeprefix("val/"): round(v, 4) for name, v in figures.items()}
        state = trainer.strategy.lightning_module_state_dict()  # gathered from all ranks
        if trainer.is_global_zero:
            content = {
                "codegrid": self.header,
                "state_dict": state,
                "lowest": self.lowest,
                "figures": self.figures,
                "clock": {"step": module.step, "seconds": module.seconds},
            }
            writer_of(trainer).write(content, self.save)

    def save(self, content: dict[str, Any]) -> None:
        """Write the file; if it can't be written, report it."""
        with best_effort_write(self.file):
            save_atomically(content, self.file)


def writer_of(trainer: L.Trainer) -> AtomicCheckpointIO:
    """What writes a run's checkpoints; in a run without Checkpoints, what writes at once."""
    writer = trainer.strategy.checkpoint_io
    return writer if isinstance(writer, AtomicCheckpointIO) else AtomicCheckpointIO(is_async=False)
