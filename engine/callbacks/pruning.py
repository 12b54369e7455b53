"""An early end for those points of a sweep that do worse than the others did at the same moment."""

import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from engine.console import best_effort_write, log_line
from engine.errors import InputError, check_int, check_range
from engine.module import ClockedModule
from engine.sweep import sweep_folder

SERIES = "prune.jsonl"  # what each validation of a run found, in its folder, for the others to read

DIRECTIONS = {"maximize": 1, "minimize": -1}  # which way is better


class Prune(Callback):
    """The median stopping rule (Golovin et al. 2017, section 3.2.1, with the others' bests in place of their means): after a
    validation a run ends whose best `figure` so far is worse than the median of the bests that a sweep's other points had by then.

    By then: at the same share of the run. It begins when `warmup` of the run is over and `least` others have come as far,
    finished or not. `pruned_at` is the step at which this one was ended. Outside of a sweep nothing is.
    """

    def __init__(
        self,
        figure: str = "val/psnr",
        direction: str = "maximize",
        warmup: float = 0.25,
        least: int = 3,
    ) -> None:
        if direction not in DIRECTIONS:
            raise InputError(
                f"callbacks.prune.direction={direction} must be one of {', '.join(DIRECTIONS)}"
            )
        check_range("callbacks.prune.warmup", warmup, 0, 1)
        check_int("callbacks.prune.least", least, 1, "other run")
        self.figure, self.sign, self.warmup, self.least = (
            figure,
            DIRECTIONS[direction],
            warmup,
            least,
        )
        self.pruned_at: int | None = None
        self._judged = 0  # the step of the last validation

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        sweep = sweep_folder()
        if trainer.state.fn != "fit" or sweep is None:
            return
        known = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if self.figure not in known:
            raise InputError(
                f"callbacks.prune.figure={self.figure} is not found by validation; there is {', '.join(known)}"
            )
        series, progress = Path(trainer.default_root_dir) / SERIES, module.now.progress
        self._judged = module.step
        if trainer.is_global_zero:
            with best_effort_write(series), series.open("a") as lines:
                lines.write(
                    json.dumps(
                        {"step": module.step, "progress": progress, self.figure: known[self.figure]}
                    )
                    + "\n"
                )
        worse = (
            trainer.is_global_zero
            and progress >= self.warmup
            and self.is_worse(sweep, series, progress)
        )
        if trainer.strategy.reduce_boolean_decision(worse, all=False) and progress < 1:
            self.pruned_at, trainer.should_stop = module.step, True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget what a resumed run found after the checkpoint that it goes on from, for it will find that again."""
        assert isinstance(module, ClockedModule)
        series = Path(trainer.default_root_dir) / SERIES
        if trainer.is_global_zero and series.is_file():
            rows = [line for line in series.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in rows if json.loads(line)["step"] <= self._judged]
            with best_effort_write(series):
                temporary = series.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                os.replace(temporary, series)

    def state_dict(self) -> dict[str, Any]:
        return {"judged": self._judged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._judged = state_dict["judged"]

    def is_worse(self, sweep: Path, series: Path, progress: float) -> bool:
        """Whether this run's best up to `progress` is under the median of the others', where there are enough of them."""
        point, *deeper = series.relative_to(
            sweep
        ).parts  # deeper: of a pipeline's points the same part
        others = [
            path.joinpath(*deeper)
            for path in sweep.iterdir()
            if path.name != point and not path.name.startswith(".")
        ]
        bests = [best for file in others if (best := self.best(file, progress)) is not None]
        mine = self.best(series, progress)
        if mine is None:  # it could not be written
            return False
        if len(bests) < self.least or mine >= median(bests):
            return False
        log_line(
            f"pruned at {progress:.0%}: {self.figure} is {self.sign * mine:.4g} at best, and of {len(bests)} others half had "
            f"reached {self.sign * median(bests):.4g} by then"
        )
        return True

    def best(self, series: Path, progress: float) -> float | None:
        """The best figure, made so that high is good, that a run had when it was this far; None where it has not come as far."""
        if not series.is_file():
            return None
        found = [
            json.loads(line) for line in series.read_text().splitlines() if line.endswith("}")
        ]  # one may be in the making
        if not found or found[-1]["progress"] < progress:
            return None
        values = [self.sign * row[self.figure] for row in found if row["progress"] <= progress]
        return max((value for value in values if math.isfinite(value)), default=-math.inf)
