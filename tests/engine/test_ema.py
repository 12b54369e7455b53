"""The running average of the tokenizer's weights."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from engine.callbacks.checkpointing import Checkpoints
from engine.callbacks.ema import WeightAverage, weights_of
from engine.checkpoint import AVERAGE, LAST, make_header, read_checkpoint
from engine.errors import InputError
from tests.helpers.configs import SMALL, compose_config
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.load import load_tokenizer
from vqgan.losses.gate import Gate

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


def copied(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights_of(module).items()}


class Every(Callback):
    """The weights after each update."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.taken.append(copied(module))


def test_the_average_is_the_running_mean_with_a_memory_that_grows() -> None:
    average, every, trained = (
        WeightAverage(0.35),
        Every(),
        make_module(Gate(start=2, ramp=0, warmup=0), steps=5, freeze_codes=False),
    )
    expected = copied(trained)
    fit(trained, [average, every])
    for n, taken in enumerate(every.taken, 1):
        decay = min(0.35, (1 + n) / (10 + n))
        for name, value in taken.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value
    assert expected.keys() == average.values.keys()
    for name, value in expected.items():
        torch.testing.assert_close(average.values[name], value)


def test_without_a_memory_the_average_is_the_weights() -> None:
    average, trained = WeightAverage(0.0), make_module()
    fit(trained, [average])
    assert all(
        torch.equal(average.values[name], value) for name, value in weights_of(trained).items()
    )


def test_averaging_changes_nothing_of_the_training() -> None:
    plain, averaged = make_module(), make_module()
    fit(plain)
    fit(averaged, [WeightAverage()])
    assert all(
        torch.equal(value, weights_of(averaged)[name]) for name, value in weights_of(plain).items()
    )


class Seen(Callback):
    """The weights that a validation used."""

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: Any
    ) -> None:
        self.used = copied(module)


def test_validation_judges_the_average_and_gives_the_weights_back() -> None:
    average, seen, trained = WeightAverage(0.9), Seen(), make_module()
    fit(trained, [average, seen])
    trainer = fit(make_module(steps=1), [])
    before, kept = copied(trained), {name: value.clone() for name, value in average.values.items()}
    trainer.callbacks = [average, seen]  # type: ignore[attr-defined]
    trainer.validate(trained, make_noise(), verbose=False)
    assert all(torch.equal(seen.used[name], value) for name, value in kept.items())
    assert not all(torch.equal(before[name], value) for name, value in kept.items())
    assert all(torch.equal(value, weights_of(trained)[name]) for name, value in before.items())


def test_a_validation_that_breaks_off_gives_the_weights_back_before_they_are_saved(
    tmp_path: Path,
) -> None:
    class Break(Callback):
        def on_validation_batch_start(
            self, trainer: L.Trainer, module: L.LightningModule, *_: Any
        ) -> None:
            raise RuntimeError("broken off")

    trained, every = make_module(), Every()
    checkpoints = Checkpoints(tmp_path, make_header("vqgan", compose_config("stage=vqgan")), 100)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(trained, [WeightAverage(0.9), every, Break(), checkpoints])
    saved = read_checkpoint(tmp_path, "vqgan")["state_dict"]
    assert all(
        torch.equal(saved[f"tokenizer.{name}"], value) for name, value in every.taken[-1].items()
    )


def test_whoever_loads_the_tokenizer_gets_the_average_and_a_resumed_run_both(
    tmp_path: Path,
) -> None:
    average, trained = WeightAverage(0.9), make_module(Gate(start=0, ramp=0, warmup=0), steps=4)
    fit(
        trained, [average, Checkpoints(tmp_path, make_header("vqgan", compose_config(*SMALL)), 100)]
    )
    content = read_checkpoint(tmp_path, "vqgan")
    assert all(torch.equal(content[AVERAGE][name], value) for name, value in average.values.items())
    assert all(
        torch.equal(content["state_dict"][f"tokenizer.{name}"], value)
        for name, value in weights_of(trained).items()
    )
    assert not any(name.startswith("discriminator") for name in content[AVERAGE])
    chosen = compose_config(*SMALL, "model.encoder.depth=1", "model.decoder.depth=1")
    content["codegrid"] = make_header("vqgan", chosen)
    torch.save(content, tmp_path / LAST)
    loaded, _ = load_tokenizer(tmp_path)
    assert all(
        torch.equal(average.values[name], value) for name, value in loaded.state_dict().items()
    )


@pytest.mark.parametrize("decay", [-0.1, 1.1, "much"])
def test_a_decay_that_makes_no_sense_is_refused(decay: Any) -> None:
    with pytest.raises(InputError, match=r"callbacks.average.decay="):
        WeightAverage(decay)
