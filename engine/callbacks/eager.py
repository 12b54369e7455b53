"""Validation without compiled code."""

from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class EagerValidation(Callback):
    """Runs validation without compiled code: compiling it too, without gradients and for a smaller last batch, would take
    longer than it saves."""

    def __init__(self) -> None:
        self._eager = ExitStack()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._eager.close()  # whatever stance was set before

    def on_exception(self, *_: Any) -> None:
        self._eager.close()
