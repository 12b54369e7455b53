"""The running average of the tokenizer's weights."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.callbacks.ema import WeightAverage, learned_state
from codegrid.engine.checkpoint import AVERAGE, LAST, make_header, read_checkpoint
from codegrid.engine.errors import InputError
from tests.helpers.configs import SMALL, compose_plain
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.load import load_tokenizer
from vqgan.losses.gate import Gate

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


def copy_state(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learned_state(module).items()}


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


class WeightHistory(Callback):
    """The weights after each update."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.states.append(copy_state(module))


def test_the_average_is_the_running_mean_with_a_memory_that_grows() -> None:
    average = WeightAverage(0.35)
    history = WeightHistory()
    module = make_module(Gate(start=2, ramp=0, warmup=0), steps=5, freeze_codes=False)
    expected = copy_state(module)
    fit(module, [average, history])
    for n, state in enumerate(history.states, 1):
        decay = min(0.35, (1 + n) / (10 + n))
        for name, value in state.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value
    assert expected.keys() == average.values.keys()
    for name, value in expected.items():
        torch.testing.assert_close(average.values[name], value)


def test_without_a_memory_the_average_equals_the_weights() -> None:
    average = WeightAverage(0.0)
    module = make_module()
    fit(module, [average])
    assert_equal(average.values, learned_state(module))


def test_averaging_does_not_change_the_training() -> None:
    plain = make_module()
    averaged = make_module()
    fit(plain)
    fit(averaged, [make(WeightAverage)])
    assert_equal(learned_state(averaged), learned_state(plain))


class ValidatedWeights(Callback):
    """The weights that a validation used."""

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: Any
    ) -> None:
        self.state = copy_state(module)


def test_validation_uses_the_average_and_restores_the_weights() -> None:
    average = WeightAverage(0.9)
    validated = ValidatedWeights()
    module = make_module()
    fit(module, [average, validated])
    trainer = fit(make_module(steps=1), [])
    weights = copy_state(module)
    averaged = {name: value.clone() for name, value in average.values.items()}
    trainer.callbacks = [average, validated]  # type: ignore[attr-defined]
    trainer.validate(module, make_noise(), verbose=False)
    assert_equal(validated.state, averaged)
    assert not all(torch.equal(weights[name], value) for name, value in averaged.items())
    assert_equal(learned_state(module), weights)


def test_a_validation_that_breaks_off_restores_the_weights_before_they_are_saved(
    tmp_path: Path,
) -> None:
    class Break(Callback):
        def on_validation_batch_start(
            self, trainer: L.Trainer, module: L.LightningModule, *_: Any
        ) -> None:
            raise RuntimeError("broken off")

    history = WeightHistory()
    checkpoints = Checkpoints(make_header("vqgan", compose_plain("stage=vqgan")), 100)
    callbacks = [WeightAverage(0.9), history, Break(), checkpoints]
    with pytest.raises(RuntimeError, match="broken off"):
        fit(make_module(), callbacks, default_root_dir=tmp_path)
    saved = read_checkpoint(tmp_path, "vqgan")["state_dict"]
    for name, value in history.states[-1].items():
        assert torch.equal(saved[f"tokenizer.{name}"], value), name


def test_a_loaded_tokenizer_is_the_average_and_a_checkpoint_holds_both(tmp_path: Path) -> None:
    average = WeightAverage(0.9)
    module = make_module(Gate(start=0, ramp=0, warmup=0), steps=4)
    chosen = compose_plain(*SMALL, "model.encoder.depth=1", "model.decoder.depth=1")
    fit(
        module,
        [average, Checkpoints(make_header("vqgan", chosen), 100)],
        default_root_dir=tmp_path,
    )
    assert (tmp_path / LAST).is_file()
    content = read_checkpoint(tmp_path, "vqgan")
    assert_equal(content[AVERAGE], average.values)
    for name, value in learned_state(module).items():
        assert torch.equal(content["state_dict"][f"tokenizer.{name}"], value), name
    assert not any(name.startswith("discriminator") for name in content[AVERAGE])
    tokenizer, _ = load_tokenizer(tmp_path)
    assert_equal(tokenizer.state_dict(), average.values)


@pytest.mark.parametrize("decay", [-0.1, 1.1, "much"])
def test_a_decay_outside_0_to_1_is_refused(decay: Any) -> None:
    with pytest.raises(InputError, match=r"callbacks.average.decay="):
        WeightAverage(decay)
