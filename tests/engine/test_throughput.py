"""Logged throughput and memory."""

import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from codegrid.engine.callbacks.throughput import Throughput
from codegrid.engine.environment import GIB, resident_memory
from tests.helpers.stage1 import fit, lightning_warnings, make_module

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


class SlowValidation(Callback):
    """Validations that take 0.3 s longer, and the logged rates."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_validation_start(self, *_: Any) -> None:
        time.sleep(0.3)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if "train/images_per_second" in trainer.callback_metrics:
            self.rates.append(float(trainer.callback_metrics["train/images_per_second"]))


def test_throughput_leaves_validation_out_and_memory_is_that_of_the_process() -> None:
    slow = SlowValidation()
    throughput = Throughput()
    trainer = fit(make_module(steps=12), [throughput, slow], log_every_n_steps=1)
    assert len(slow.rates) == 12
    assert slow.rates[4] > 4 / 0.3  # a batch of 4, after a validation
    assert float(trainer.callback_metrics["train/memory_gib"]) == pytest.approx(
        resident_memory(), rel=0.5
    )
    assert throughput.peak >= float(trainer.callback_metrics["train/memory_gib"]) > 0.05


def test_a_logged_rate_counts_all_images_since_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = iter(range(0, 1000, 10))
    monkeypatch.setattr(
        "codegrid.engine.callbacks.throughput.time",
        SimpleNamespace(monotonic=lambda: float(next(moments))),
    )
    slow = SlowValidation()
    fit(make_module(steps=4), [Throughput(), slow], log_every_n_steps=3)
    assert slow.rates[0] == pytest.approx(3 * 4 / 10)


def test_resident_memory_grows_with_an_allocated_tensor() -> None:
    before = resident_memory()
    tensor = torch.ones(2**26)
    assert resident_memory() - before == pytest.approx(2**28 / GIB, rel=0.2)
    del tensor
