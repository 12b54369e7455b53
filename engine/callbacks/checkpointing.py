"""When a run's checkpoints are written, and how it goes on from one."""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from engine.callbacks.signals import Stop, StopNow
from engine.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    find_damage,
    read_checkpoint,
    save_atomically,
)
from engine.console import best_effort_write, log_line
from engine.distributed import all_gather, own_entry, run_on_main
from engine.errors import InputError
from engine.loggers import truncate
from engine.module import ClockedModule

PAUSES = (10, 30, 60, 120, 240)  # seconds between tries to write the last state of a run


class Checkpoints(Callback):
    """Writes checkpoints/last.ckpt every `every` of the module's own steps, at the end, and when a run breaks off between two
    of its updates; the file before is kept as previous.ckpt.

    A checkpoint is of a whole update, after its logs and its validation, so that a resumed run repeats nothing and leaves
    nothing out: files that the run adds to are cut back to the checkpoint's step. Also keeps the state of the random streams,
    which Lightning leaves out, and the run's header. A validation that a run breaks off in is made up for when it is resumed.

    Where a checkpoint can't be written the run says so, goes on, and tries again at the next; at its end for some minutes more,
    and then in the system's folder for temporary files. Only then, with its last state not where it belongs, it fails.
    """

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        every: int,
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self.file, self.header, self.every, self.pauses = folder / LAST, header, every, pauses
        self._random: list[dict[str, Any]] = []  # of each rank
        self._unjudged = False  # whether the checkpoint that was loaded lacks its validation
        self._logged: dict[str, float] = {}
        self._judged = 0  # the step of the last validation that came to its end
        self._saved = 0, 0  # the step of the last save, and the last validation then

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.between not in data.between:
            data.between.append(self.between)

    def between(self, trainer: L.Trainer) -> None:
        """After an update with its logs and its validation, before the next; also before that validation, for it may be long."""
        module = trainer.lightning_module
        assert isinstance(module, ClockedModule)
        if trainer.training:  # Lightning counts a validation that it leaves out after a resume as a step of the loggers
            trainer.fit_loop.epoch_loop._batches_that_stepped = module.step
        if (
            module.step % self.every
            or (module.step, self._judged) == self._saved
            or not module.step
        ):
            return
        try:
            self.save(trainer)
        except OSError as error:
            kept = (
                f"the last one is of step {self._saved[0]}"
                if self._saved[0]
                else "there is none yet"
            )
            log_line(
                f"step {module.step}: {self.file} can't be written ({error.strerror or error}); {kept}, and the run goes on and "
                f"tries again after {self.every} more steps"
            )

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.should_stop:
            self.between(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state as it is, or raise OSError, on all ranks: each has a part in it, and they must agree on the next try."""
        module = trainer.lightning_module
        assert isinstance(module, ClockedModule)
        module.check()  # a broken model must not take a good one's place
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if failed := run_on_main(lambda: self._written(content)):
            raise failed
        self._saved = module.step, self._judged

    def _written(self, content: dict[str, Any]) -> OSError | None:
        try:
            save_atomically(content, self.file, self.file.with_name(PREVIOUS.name))
        except OSError as error:
            return error
        return None

    def save_at_last(self, trainer: L.Trainer, pauses: Sequence[float]) -> None:
        """Save what would otherwise be gone with this process: try again after each of the pauses, and then elsewhere."""
        for pause in (*pauses, None):
            try:
                return self.save(trainer)
            except OSError as error:
                reason = f"{self.file} can't be written ({error.strerror or error})"
            if pause is not None:
                log_line(
                    f"{reason}; the run is over and its state still in memory: another try in {pause:g} s"
                )
                time.sleep(pause)
        own, self.file = (
            self.file,
            Path(tempfile.gettempdir()) / f"codegrid-{self.header['config'].get('id')}" / LAST,
        )
        try:
            self.save(trainer)
        except OSError as error:
            raise InputError(
                f"{reason}, nor can {self.file} ({error.strerror or error}); the run's last state is lost"
            ) from error
        finally:
            elsewhere, self.file = self.file, own
        raise InputError(
            f"{reason}; the run's last state is in {elsewhere}: move it to {own}, and go on with resume="
        )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        trainer.fit_loop.epoch_loop._batches_that_stepped = module.step
        self.save_at_last(trainer, self.pauses)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(module, ClockedModule)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        whole = batches.completed == batches.ready and (module.step, self._judged) != self._saved
        together = isinstance(exception, Stop) or (
            trainer.world_size == 1 and not isinstance(exception, StopNow)
        )
        if whole and module.step and trainer.state.fn == "fit" and module.broken < 0 and together:
            self.save_at_last(trainer, ())  # whoever ends a program has little patience

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        self._judged = module.step

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(module, ClockedModule)
        checkpoint["codegrid"] = self.header
        checkpoint["unjudged"] = (
            module.step % (trainer.val_check_batch or math.inf) == 0 and self._judged != module.step
        )
        checkpoint["logged"] = {
            name: float(value)
            for name, value in trainer.logged_metrics.items()
            if name.startswith("train/")
        }
        own = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        checkpoint["random"] = all_gather(own)  # every rank has streams of its own

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random, self._unjudged = checkpoint["random"], bool(checkpoint.get("unjudged"))
        self._logged = checkpoint.get("logged", {})
        self._judged = 0 if self._unjudged else checkpoint["clock"]["step"]
        self._saved = checkpoint["clock"]["step"], self._judged
        if (
            self._unjudged
        ):  # by itself Lightning leaves the validation out, or takes half of it for the whole
            fit = checkpoint["loops"]["fit_loop"]
            for count in ("total", "current"):
                trained, judged = (
                    fit[f"epoch_loop.{loop}batch_progress"][count] for loop in ("", "val_loop.")
                )
                trained["completed"] = trained["processed"]
                judged.update(
                    ready=1, started=1, processed=0, completed=0
                )  # in the middle of its first batch

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if (
            self._logged
        ):  # in the logs a figure that is not found at every step stays until it is found again
            module.log_dict(self._logged)
            self._logged = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        if not self._random:
            return
        truncate(trainer.loggers, module.step, self._unjudged)
        if own := own_entry(
            self._random, {}
        ):  # else this rank is new, and has numbers that no other rank has
            torch.set_rng_state(
                own["cpu"]
            )  # as late as possible: building loaders and validating draw numbers too
            if own["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"])


class BestCheckpoint(Callback):
    """Keeps in checkpoints/best.ckpt the weights with the lowest `figure` that a validation found.

    `figures` are what that validation found, all of it, and `step` when. The weights are those that it used: this callback
    goes before one that takes an average out again. A resumed run goes on with the file that it finds.
    """

    def __init__(self, folder: Path, header: dict[str, Any], figure: str) -> None:
        self.file, self.header, self.figure = folder / BEST, header, figure
        self.lowest, self.step, self.figures = math.inf, 0, dict[str, float]()
        if self.file.is_file() and (wrong := find_damage(self.file)):
            log_line(
                f"{self.file} is damaged ({wrong}): the best is what the validations to come find best"
            )
        elif self.file.is_file():
            kept = read_checkpoint(self.file, header["stage"])
            self.lowest, self.step, self.figures = (
                kept["lowest"],
                kept["clock"]["step"],
                kept["figures"],
            )

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        found = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if found[self.figure] >= self.lowest or not math.isfinite(found[self.figure]):
            return
        self.lowest, self.step = found[self.figure], module.step
        self.figures = {name.removeprefix("val/"): round(value, 4) for name, value in found.items()}
        state = (
            trainer.strategy.lightning_module_state_dict()
        )  # of all ranks' shares, where they have but these
        if trainer.is_global_zero:
            content = {
                "codegrid": self.header,
                "state_dict": state,
                "lowest": self.lowest,
                "figures": self.figures,
            }
            with best_effort_write(self.file):
                save_atomically(
                    content | {"clock": {"step": module.step, "seconds": module.seconds}}, self.file
                )
