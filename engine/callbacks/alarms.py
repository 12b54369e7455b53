"""What all alarms share: they wait until they are sure, and then report once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from codegrid.engine.console import best_effort_write, log_line
from codegrid.engine.errors import check_int
from codegrid.engine.folder import DOCTOR
from codegrid.engine.module import ClockedModule


@dataclass
class Sign:
    """Something that is wrong now: its name, what is observed, and what to try against it."""

    name: str
    observation: str
    remedy: str


class Alarms(Callback):
    """Reports what is wrong, since when, and what to try, once `patience` looks at a run in a row agree.

    Each alarm is reported once, on the terminal and in doctor.txt of the run folder. `alarms` has all of them, also those
    from before a run was resumed. A loss or gradient that is NaN or infinite ends the run within `every` updates; its
    last checkpoint is from before that.
    """

    def __init__(self, every: int, patience: int) -> None:
        check_int("callbacks.doctor.every", every, 1, "update")
        check_int("callbacks.doctor.patience", patience, 1, "look")
        self.every = every
        self.patience = patience
        self.alarms: list[str] = []
        self._last_look = 0  # the step of the last look
        self._signs: dict[str, tuple[int, int]] = {}  # name -> first step, number of looks

    @property
    def state_key(self) -> str:
        return "Doctor"  # as in the checkpoints of version 0.1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, ClockedModule)
        if module.step % self.every == 0:
            if trainer.world_size > 1:  # all ranks stop together, or the others would wait
                broken = module.broken.to(module.device)
                module.broken = trainer.strategy.reduce(broken, reduce_op="max")
            module.check()

    def look(self, trainer: L.Trainer, module: ClockedModule, signs: Iterable[Sign]) -> None:
        """Count each sign of trouble, and report those that persist.

        A run that was killed after its last update validates again when it is resumed: that is the same look.
        """
        if module.step == self._last_look:
            return
        current = {sign.name: sign for sign in signs}
        for name in self._signs.keys() - current.keys():
            del self._signs[name]
        for name, sign in current.items():
            since, looks = self._signs.get(name, (self._last_look, 0))
            self._signs[name] = since, looks + 1
            if looks + 1 == self.patience:
                self.report(
                    trainer,
                    f"step {module.step}: {sign.observation}, since step {since}; try {sign.remedy}",
                )
        self._last_look = module.step

    def report(self, trainer: L.Trainer, alarm: str) -> None:
        """Print an alarm and add it to doctor.txt."""
        self.alarms.append(alarm)
        if trainer.is_global_zero:
            log_line(f"doctor: {alarm}")
            self.write(trainer)

    def write(self, trainer: L.Trainer) -> None:
        """Write doctor.txt with this run's alarms, without those raised after the checkpoint that it resumed from."""
        file = Path(trainer.default_root_dir) / DOCTOR
        with best_effort_write(file):
            file.write_text("".join(alarm + "\n" for alarm in self.alarms))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and (Path(trainer.default_root_dir) / DOCTOR).is_file():
            self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"said": self.alarms, "looked": self._last_look, "signs": self._signs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alarms = state_dict["said"]  # the keys of version 0.1
        self._last_look = state_dict["looked"]
        self._signs = state_dict["signs"]
