"""One line that shows how far a run is and how well it does."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from codegrid.engine.console import refresh_interval
from codegrid.engine.module import ClockedModule


class Progress(Callback):
    """A bar over the whole run, by the module's own clock, with the figures in `labels` (log name -> label)."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self._bar: tqdm[Any] | None = None
        self._last_refresh = 0.0
        self._samples = 0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=1.0,
                initial=module.now.progress,
                desc=type(module).__name__,
                bar_format="{desc} {percentage:3.0f}%|{bar:24}| {postfix} [{elapsed}<{remaining}]",
                leave=True,
            )
            self._start = time.monotonic()

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
        if self._bar is not None and moment - self._last_refresh > refresh_interval():
            self._last_refresh = moment
            self._refresh(trainer, module)

    def _refresh(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._bar is not None
        assert isinstance(module, ClockedModule)
        metrics = trainer.callback_metrics
        rate = self._samples / max(time.monotonic() - self._start, 1e-9)
        words = [f"step {module.step}", f"{rate:.0f} images/s"]
        for name, label in self.labels.items():
            if name in metrics:
                words.append(f"{label} {float(metrics[name]):.4g}")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
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
            self._refresh(trainer, module)
            self._bar.close()
            self._bar = None
