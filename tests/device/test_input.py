"""Batches on their way to a GPU, and checkpoints on their way from it: `python -m pytest -m device tests/device`."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from codegrid.data.loading import BatchDataModule
from codegrid.data.samples import ArraySamples
from codegrid.engine import writer as writing
from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.folder import LAST, PREVIOUS
from codegrid.engine.writer import AtomicCheckpointIO, copy_state
from tests.helpers.stage1 import lightning_warnings, make_module, make_noise

pytestmark = [pytest.mark.device, lightning_warnings]

BATCHES = 60
SIZE = 2**20  # bytes of a sample, so that copies take long enough to overlap


class Numbers(BatchDataModule):
    """Samples of a mebibyte each, all of whose values are the sample's number."""

    def load_samples(self, split: str) -> ArraySamples:
        values = np.repeat(np.arange(16, dtype=np.uint8)[:, None], SIZE, 1)
        return ArraySamples(values, np.arange(16))


@pytest.fixture
def waits_are_errors(device: str) -> Iterator[None]:
    """Inside, an operation that makes the host wait for a GPU raises."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    yield
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def test_batches_arrive_whole_while_the_device_computes_and_the_host_does_not_wait(
    device: str, waits_are_errors: None
) -> None:
    data = Numbers(8, 0, seed=0)
    batches = iter(data.train_dataloader())
    side = 2048 if device == "cuda" else 32
    work = torch.ones(side, side, device=device)
    lowest, highest, expected = [], [], []
    for _ in range(BATCHES):
        batch = next(batches)
        expected.append(batch[1].clone())
        values, labels = data.transfer_batch_to_device(batch, torch.device(device), 0)
        for _ in range(20):  # so that the device lags behind the host
            work = work @ work / side
        lowest.append(values.amin(1) - labels)
        highest.append(values.amax(1) - labels)
        del batch, values, labels  # its memory is free for the next batches
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.stack(lowest).any()
    assert not torch.stack(highest).any()
    assert len({tuple(labels.tolist()) for labels in expected}) > 10


def test_a_state_of_the_device_is_copied_to_the_cpu_and_shares_what_it_shared(device: str) -> None:
    weight = torch.arange(12.0, device=device).view(3, 4)
    copied = copy_state({"a": weight, "b": [weight.T, torch.get_rng_state()]})
    weight.zero_()
    assert copied["a"].device.type == "cpu"
    assert torch.equal(copied["a"], torch.arange(12.0).view(3, 4))
    copied["a"][0, 1] = 100
    assert copied["b"][0][1, 0] == 100


class Slow:
    """save_atomically for a disk that takes a while."""

    def __call__(self, content: Any, file: Path, previous: Path | None = None) -> None:
        time.sleep(0.3)
        save_atomically(content, file, previous)


class Keep(Callback):
    """Keeps a copy of the weights at a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.step == self.step:
            self.state = copy.deepcopy(module.state_dict())


def test_a_checkpoint_from_the_device_is_of_the_moment_of_its_save(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "save_atomically", Slow())
    keep = Keep(6)
    trainer = L.Trainer(
        max_epochs=-1, accelerator="gpu" if device == "cuda" else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path, plugins=[AtomicCheckpointIO(is_async=True)],
        callbacks=[keep, Checkpoints(make_header("vqgan", {"id": "mine"}), 3)],
    )  # fmt: skip
    trainer.fit(make_module(), make_noise())
    saved = torch.load(tmp_path / PREVIOUS, weights_only=True)
    assert saved["clock"]["step"] == 6
    assert all(value.device.type == "cpu" for value in saved["state_dict"].values())
    for name, value in keep.state.items():
        assert torch.equal(saved["state_dict"][name], value.cpu()), name
    assert torch.load(tmp_path / LAST, weights_only=True)["clock"]["step"] == 8
