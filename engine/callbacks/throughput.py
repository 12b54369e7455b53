"""How fast a run is, and how much memory it takes."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from codegrid.engine.environment import GIB, resident_memory
from codegrid.engine.module import ClockedModule


class Throughput(Callback):
    """Logs, at every logged step,

    train/images_per_second    since the last logged step, over all devices and without validations (grids of codes for a prior)
    train/memory_gib           memory that this process holds
    train/gpu_memory_gib       on a GPU, the most that was allocated so far

    `peak` is the most memory of the device so far, in GiB: allocated on the GPU, or else held by the process.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self._images = 0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)  # of this run alone, in a sweep too
        self._restart()

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
            rate = self._images / max(time.monotonic() - self._since, 1e-9)
            figures = {"images_per_second": rate, **self.measure_memory(module)}
            module.log_dict({f"train/{name}": value for name, value in figures.items()})
            self._restart()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.measure_memory(module)
        self._restart()

    def measure_memory(self, module: L.LightningModule) -> dict[str, float]:
        """GiB of this process and of its GPU; updates `peak`."""
        memory = {"memory_gib": resident_memory()}
        if module.device.type == "cuda":
            memory["gpu_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / GIB
        self.peak = max(self.peak, memory.get("gpu_memory_gib", memory["memory_gib"]))
        return memory

    def _restart(self) -> None:
        self._images = 0
        self._since = time.monotonic()
