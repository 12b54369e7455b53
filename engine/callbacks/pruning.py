"""An early end for the points of a sweep that do worse than the others did at the same moment."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from codegrid.engine.console import best_effort_write, log_line
from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.figures import format_figures, is_figure
from codegrid.engine.folder import PRUNE_SERIES, write_atomically
from codegrid.engine.module import ClockedModule
from codegrid.engine.sweep import sweep_folder

DIRECTIONS = {"maximize": 1, "minimize": -1}  # which way is better


class Prune(Callback):
    """The median stopping rule (Golovin et al. 2017, section 3.2.1, with the others' best in place of their mean).

    After a validation, a run ends if its best `figure` so far is worse than the median of the bests that the sweep's other
    points had at the same share of the run. The rule applies once `warmup` of the run is over and `min_others` other
    points have come as far, finished or not. `pruned_at` is the step at which this run was ended. Outside of a sweep
    nothing is pruned.
    """

    def __init__(self, figure: str, direction: str, warmup: float, min_others: int) -> None:
        if direction not in DIRECTIONS:
            raise InputError(
                f"callbacks.prune.direction={direction} must be one of {', '.join(DIRECTIONS)}"
            )
        check_range("callbacks.prune.warmup", warmup, 0, 1)
        check_int("callbacks.prune.min_others", min_others, 1, "other run")
        self.figure = figure
        self.sign = DIRECTIONS[direction]
        self.warmup = warmup
        self.min_others = min_others
        self.pruned_at: int | None = None
        self._validated = 0  # the step of the last validation

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        sweep = sweep_folder()
        if trainer.state.fn != "fit" or sweep is None:
            return
        names = [name for name in trainer.callback_metrics if name.startswith("val/")]
        if self.figure not in names:
            raise InputError(
                f"callbacks.prune.figure={self.figure} is not a figure of this validation; "
                f"there is {', '.join(names)}"
            )
        series = Path(trainer.default_root_dir) / PRUNE_SERIES
        progress = module.now.progress
        self._validated = module.step
        is_worse = False
        if trainer.is_global_zero:
            value = float(trainer.callback_metrics[self.figure])
            row = {"step": module.step, "progress": progress, self.figure: value}
            with best_effort_write(series), series.open("a") as lines:
                lines.write(format_figures(row) + "\n")
            is_worse = progress >= self.warmup and self.is_worse(sweep, series, progress)
        if trainer.strategy.reduce_boolean_decision(is_worse, all=False) and progress < 1:
            self.pruned_at = module.step
            trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Drop the validations after the checkpoint that a resumed run starts from: it repeats them."""
        assert isinstance(module, ClockedModule)
        series = Path(trainer.default_root_dir) / PRUNE_SERIES
        if trainer.is_global_zero and series.is_file():
            rows = [row for row in read_series(series) if row["step"] <= self._validated]
            with best_effort_write(series):
                write_atomically(series, "".join(format_figures(row) + "\n" for row in rows))

    def state_dict(self) -> dict[str, Any]:
        return {"judged": self._validated}  # the key of version 0.1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated = state_dict["judged"]

    def is_worse(self, sweep: Path, series: Path, progress: float) -> bool:
        """Whether this run's best up to `progress` is below the median of enough others'."""
        point, *deeper = series.relative_to(sweep).parts  # deeper: a pipeline's part
        others = [
            self.best(path.joinpath(*deeper), progress)
            for path in sweep.iterdir()
            if path.name != point and not path.name.startswith(".")
        ]
        bests = [best for best in others if best is not None]
        own = self.best(series, progress)
        if own is None or len(bests) < self.min_others or own >= median(bests):
            return False  # own is None where the file could not be written
        reached = (
            f"is {self.sign * own:.4g} at best" if math.isfinite(own) else "was never a number"
        )
        log_line(
            f"pruned at {progress:.0%}: {self.figure} {reached}; "
            f"half of {len(bests)} other points had reached {self.sign * median(bests):.4g} by then"
        )
        return True

    def best(self, series: Path, progress: float) -> float | None:
        """A run's best figure up to `progress`, with the sign that makes high good; None if it has not come as far.

        Minus infinity stands for a run none of whose figures was a number.
        """
        rows = [
            row
            for row in (read_series(series) if series.is_file() else ())
            if self.figure in row  # a point may be pruned by another figure
        ]
        if not rows or rows[-1]["progress"] < progress:
            return None
        values = [row[self.figure] for row in rows if row["progress"] <= progress]
        return max((self.sign * value for value in values if is_figure(value)), default=-math.inf)


def read_series(file: Path) -> Iterator[dict[str, Any]]:
    """The complete rows of a file that another run may be writing."""
    for line in file.read_text().splitlines():
        if line.endswith("}"):
            yield json.loads(line)
