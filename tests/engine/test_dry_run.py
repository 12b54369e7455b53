"""What a dry run forecasts."""

from functools import cache

import pytest
import torch
from torch import Tensor

from codegrid.data.tokens import CodeDataModule
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.dry_run import Forecast, describe_trial, make_forecast, try_updates
from codegrid.engine.rehearsal import Rehearsal, StepCost, list_parts
from tests.helpers.stage1 import make_module, make_noise
from tests.helpers.stage2 import make_prior_module
from vqgan.losses.gate import Gate
from vqgan.module import VQGAN

CPU = torch.device("cpu")


def rehearse(module: VQGAN, is_fake: bool) -> Rehearsal:
    return Rehearsal(module, make_noise(), [WeightAverage(0.99)], CPU, "32-true", is_fake)


def measure(module: VQGAN, is_fake: bool, n: int = 8) -> dict[str, StepCost]:
    rehearsal = rehearse(module, is_fake)
    batch = make_noise().read_first(n)
    batch = rehearsal.blank(batch, n)
    for mark in module.phases.values():
        rehearsal.step(mark, batch)
    return {name: rehearsal.step(mark, batch) for name, mark in module.phases.items()}


def make_gan() -> VQGAN:
    return make_module(Gate(0.5, ramp=0.0, warmup=0.25))


@cache
def measure_fake() -> dict[str, StepCost]:
    """What the steps of make_gan cost, measured once: fake tensors take seconds."""
    return measure(make_gan(), is_fake=True)


def test_fake_tensors_cost_what_real_ones_do() -> None:
    real, fake = measure(make_gan(), is_fake=False), measure_fake()
    assert [*real] == ["before the gate", "discriminator warms up", "gate open"]
    for name, cost in real.items():
        assert fake[name].flops == cost.flops
        assert fake[name].part_bytes == cost.part_bytes
        assert abs(fake[name].peak - cost.peak) < 0.02 * cost.peak


def test_a_fake_rehearsal_leaves_the_module_as_it_is() -> None:
    module = make_gan()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure(module, is_fake=True)
    assert module.step == module.discriminator_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_real_rehearsal_trains() -> None:
    module = make_module()
    before = module.tokenizer.decoder.last.weight.clone()
    rehearsal = rehearse(module, is_fake=False)
    rehearsal.train(0, make_noise().read_first(4))
    assert not torch.equal(module.tokenizer.decoder.last.weight, before)


def test_the_first_phase_is_counted_with_the_moments_of_all_that_learns_in_it() -> None:
    module = make_module(Gate(0.5, ramp=0.0, warmup=0.0))  # after which the codes are frozen
    batch = make_noise().read_first(8)
    forecast = make_forecast(rehearse(module, is_fake=True), batch)
    steady = rehearse(module, is_fake=True)
    costs = [steady.step(0, steady.blank(batch, 8)).peak for _ in range(3)]
    assert costs[0] < costs[1] == costs[2]
    peak = forecast.phases["before the gate"].peak
    discriminator = module.adversary.discriminator  # type: ignore[union-attr]
    gradients = 4 * sum(p.numel() for p in discriminator.parameters())
    assert costs[1] <= peak < costs[1] + 3.1 * gradients, "the discriminator's, and its two moments"


@pytest.mark.parametrize("scale", [1.0, torch.inf])
def test_a_trial_says_whether_loss_and_gradient_are_numbers(scale: float) -> None:
    module = make_module()
    batch = make_noise().read_first(4)
    forecast = make_forecast(rehearse(module, is_fake=True), batch)
    with torch.no_grad():
        module.tokenizer.decoder.last.weight.mul_(scale)
    about = module, make_noise(), batch, [], CPU
    trial = try_updates(forecast, *about, "32-true")
    assert trial["finite"] is (scale == 1)
    assert ("no number" in describe_trial(trial)[-1]) == (scale != 1)
    assert try_updates(forecast, *about, "16-mixed")["finite"] is None


def test_a_forecast_on_real_tensors_is_not_tried_again() -> None:
    module, batch = make_module(), make_noise().read_first(4)
    forecast = make_forecast(rehearse(module, is_fake=False), batch)
    step = module.step
    trial = try_updates(forecast, module, make_noise(), batch, [], CPU, "32-true")
    assert (trial["seconds"], module.step) == (None, step)
    assert describe_trial(trial)[0].startswith("no further update was tried")


def test_memory_that_a_step_takes_in_addition_is_noticed() -> None:
    class Wasteful(VQGAN):
        def training_step(self, batch: tuple[Tensor, Tensor], n: int) -> dict[str, Tensor | None]:
            wasted = torch.zeros(10**6, device=self.device)
            out = super().training_step(batch, n)
            del wasted
            return out

    module, frugal = make_gan(), measure_fake()
    module.__class__ = Wasteful
    for name, cost in measure(module, is_fake=True).items():
        assert cost.peak - frugal[name].peak == 4 * 10**6


def test_the_state_is_weights_gradients_moments_and_the_average() -> None:
    module = make_module()
    rehearsal = rehearse(module, is_fake=True)
    rehearsal.step(0, rehearsal.blank(make_noise().read_first(4), 4))
    state = rehearsal.measure_state()
    trained = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    steps = 4 * len(rehearsal.optimizers[0].state)  # AdamW counts the updates of each weight
    assert state["gradients"] == trained
    assert state["moments"] == 2 * trained + steps
    assert state["average"] <= state["weights"]


def test_parts_of_a_prior_have_all_its_parameters() -> None:
    module, _ = make_prior_module()
    parts = list_parts(module)
    assert parts["blocks"] == list(module.model.blocks)  # type: ignore[union-attr, arg-type]
    assert all(parts.values())


def test_a_prior_is_forecast() -> None:
    module, data = make_prior_module()
    assert isinstance(data, CodeDataModule)
    rehearsal = Rehearsal(module, data, [], CPU, "bf16-mixed", is_fake=True)
    forecast = make_forecast(rehearsal, data.read_first(32))
    assert [*forecast.phases] == ["training"]
    assert sorted(forecast.points) == [4, 32, 256]
    assert forecast.memory(32) == forecast.peak


def of_points(**points: int) -> Forecast:
    cost = StepCost(points["n8"], 0, {}, {})
    return Forecast({"training": cost}, {}, {int(n[1:]): size for n, size in points.items()})


def test_memory_between_and_beyond_what_was_counted_lies_on_lines() -> None:
    forecast = of_points(n1=100, n8=170, n64=1290)
    assert [forecast.memory(n) for n in (1, 2, 8, 9, 64, 128)] == [100, 110, 170, 190, 1290, 2570]


def test_the_largest_batch_is_the_last_that_fits() -> None:
    forecast = of_points(n1=100, n8=170, n64=1290)
    for limit in (100, 109, 110, 169, 171, 1290, 10**6):
        n = forecast.largest_batch(limit)
        assert forecast.memory(n) <= limit < forecast.memory(n + 1)
    assert forecast.largest_batch(99) == 0
