"""One line that shows how far a run is and how well it does."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from codegrid.engine.console import refresh_interval
from codegrid.engine.module import ClockedModule


class Progress(Callback):
    """A bar over the whole run, by the module's own clock, with the figures in `labels` (log name -> label).

    The figures are those of the last logged step and the last validation: reading one waits for the device.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self._bar: tqdm[Any] | None = None
        self._figures: dict[str, float] = {}
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
        assert isinstance(module, ClockedModule)
        self._samples += len(batch[0]) * trainer.world_size
        is_logged = module.step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._bar is not None and (is_logged or trainer.should_stop):
            self._read(trainer)
        moment = time.monotonic()
        if self._bar is not None and moment - self._last_refresh > refresh_interval():
            self._last_refresh = moment
            self._refresh(module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._read(trainer)

    def _read(self, trainer: L.Trainer) -> None:
        metrics = trainer.callback_metrics
        self._figures = {name: float(metrics[name]) for name in self.labels if name in metrics}

    def _refresh(self, module: L.LightningModule) -> None:
        assert self._bar is not None
        assert isinstance(module, ClockedModule)
        rate = self._samples / max(time.monotonic() - self._start, 1e-9)
        words = [f"step {module.step}", f"{rate:.0f} images/s"]
        for name, value in self._figures.items():
            words.append(f"{self.labels[name]} {value:.4g}")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        self._bar.n = module.now.progress
        self._bar.refresh()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close(module)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close(module)

    def _close(self, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._refresh(module)
            self._bar.close()
            self._bar = None
