"""One line that says how far a run is and how it does."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from engine.console import refresh_interval
from engine.module import ClockedModule


class Progress(Callback):
    """A bar over the whole run, in the module's own clock, with the figures of `shown` (log name -> label)."""

    def __init__(self, shown: dict[str, str]) -> None:
        self.shown = shown
        self._bar: tqdm[Any] | None = None
        self._drawn = 0.0
        self._samples = 0
        self._began = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        if trainer.is_global_zero:
            layout = "{desc} {percentage:3.0f}%|{bar:24}| {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm(
                total=1.0,
                initial=module.now.progress,
                desc=type(module).__name__,
                bar_format=layout,
                leave=True,
            )
            self._began = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._samples += len(batch[0]) * trainer.world_size
        moment = time.monotonic()
        if self._bar is not None and moment - self._drawn > refresh_interval():
            self._drawn = moment
            self._show(trainer, module)

    def _show(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._bar is not None
        assert isinstance(module, ClockedModule)
        known = trainer.callback_metrics
        figures = [
            f"{label} {float(known[name]):.4g}"
            for name, label in self.shown.items()
            if name in known
        ]
        rate = self._samples / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(
            ", ".join([f"step {module.step}", f"{rate:.0f} images/s", *figures]), refresh=False
        )
        self._bar.n = module.now.progress
        self._bar.refresh()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close(trainer, module)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close(trainer, module)

    def _close(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._show(trainer, module)
            self._bar.close()
            self._bar = None
