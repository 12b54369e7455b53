"""What all alarms share: they wait until they are sure, and then speak once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from engine.console import best_effort_write, log_line
from engine.errors import check_int
from engine.module import ClockedModule


@dataclass
class Sign:
    """Something that is wrong now: its name, what is seen, and what to try against it."""

    name: str
    seen: str
    cure: str


class Alarms(Callback):
    """After `patience` looks at a run that agree it says what is wrong, since when, and what to try: once, on the terminal and
    in doctor.txt of the run folder; `said` has it all, also what was said before a run was resumed.

    A loss or a gradient that is no number ends the run within `every` updates, and its last checkpoint is from before.
    """

    def __init__(self, every: int = 50, patience: int = 3) -> None:
        check_int("callbacks.doctor.every", every, 1, "update")
        check_int("callbacks.doctor.patience", patience, 1, "look")
        self.every, self.patience = every, patience
        self.said: list[str] = []
        self._looked = 0  # the step of the last look
        self._signs: dict[
            str, tuple[int, int]
        ] = {}  # name -> the step since when, and in how many looks

    @property
    def state_key(self) -> str:
        return "Doctor"  # as in the checkpoints of version 0.1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, ClockedModule)
        if module.step % self.every == 0:
            if trainer.world_size > 1:  # one rank's is that of all, or the others would wait for it
                module.broken = trainer.strategy.reduce(
                    module.broken.to(module.device), reduce_op="max"
                )
            module.check()

    def look(self, trainer: L.Trainer, module: ClockedModule, signs: Iterable[Sign]) -> None:
        """Count each sign of trouble, and speak of those that stay."""
        seen = {sign.name: sign for sign in signs}
        for gone in self._signs.keys() - seen.keys():
            del self._signs[gone]
        for name, sign in seen.items():
            since, times = self._signs.get(name, (self._looked, 0))
            self._signs[name] = since, times + 1
            if times + 1 == self.patience:
                self.speak(
                    trainer, f"step {module.step}: {sign.seen}, since step {since}; try {sign.cure}"
                )
        self._looked = module.step

    def speak(self, trainer: L.Trainer, sentence: str) -> None:
        self.said.append(sentence)
        if trainer.is_global_zero:
            log_line(f"doctor: {sentence}")
            self.write(trainer)

    def write(self, trainer: L.Trainer) -> None:
        """doctor.txt with what was said in this run: not what it said after the checkpoint that it goes on from."""
        file = Path(trainer.default_root_dir) / "doctor.txt"
        with best_effort_write(file):
            file.write_text("".join(sentence + "\n" for sentence in self.said))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and (Path(trainer.default_root_dir) / "doctor.txt").is_file():
            self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"said": self.said, "looked": self._looked, "signs": self._signs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.said, self._looked, self._signs = (
            state_dict["said"],
            state_dict["looked"],
            state_dict["signs"],
        )
