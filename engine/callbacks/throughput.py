"""How fast a run is, and how much memory it takes."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from engine.environment import GIB, resident_memory
from engine.module import ClockedModule


class Throughput(Callback):
    """Wherever the loggers take a point: train/images_per_second since the last one, over all devices and without
    validations (a prior's images are grids of codes); train/memory_gib, what this process holds in memory; and on a GPU
    train/gpu_memory_gib, the most that was allocated there so far.

    `peak` is the highest memory of the device that was seen: allocated on the GPU, or else held by the process.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self._images, self._since = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)  # of this run alone, in a sweep too
        self._images, self._since = 0, time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ClockedModule)
        self._images += len(batch[0]) * trainer.world_size
        if module.step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            moment = time.monotonic()
            rate = self._images / max(moment - self._since, 1e-9)
            figures = {"images_per_second": rate, **self.memory(module)}
            module.log_dict({f"train/{name}": value for name, value in figures.items()})
            self._images, self._since = 0, moment

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.memory(module)
        self._images, self._since = 0, time.monotonic()

    def memory(self, module: L.LightningModule) -> dict[str, float]:
        """GiB of this process and of its GPU."""
        found = {"memory_gib": resident_memory()}
        if module.device.type == "cuda":
            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / GIB
        self.peak = max(self.peak, found.get("gpu_memory_gib", found["memory_gib"]))
        return found
