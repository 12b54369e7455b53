"""Deferred quantization: a run that is continuous first, and whose codes come into use later (quantizer.from)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.checkpoint import make_header
from codegrid.engine.clock import Budget, Mark, Now
from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise, make_tokenizer
from tests.helpers.stage2 import make_trainer
from vqgan.losses.gate import Gate
from vqgan.module import PLACING, VQGAN
from vqgan.quantizers.base import Quantizer, check_begin
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.kl import KL
from vqgan.quantizers.lfq import BSQ
from vqgan.quantizers.vq import VQ
from vqgan.starting import take_vectors

pytestmark = lightning_warnings

STEPS = 5


def make_deferred(begin: Mark, gate: Gate | None = None, **settings: Any) -> VQGAN:
    """A small run whose codes come into use at that moment."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(quantizer=make(VQ, 16, 8, **{"from": begin}))
    images = torch.from_numpy(make_noise().samples("train").values)
    tokenizer.initialise(make_noise().augment(images))
    return make_module(gate, STEPS, tokenizer=tokenizer, **settings)


class Diary(Callback):
    """What each update saw: the step, whether there were codes, and the codebook after it."""

    def __init__(self) -> None:
        self.indices: list[Tensor | None] = []
        self.codes: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.indices.append(outputs["indices"])
        self.codes.append(module.tokenizer.quantizer.codes().detach().clone())


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or module.step >= self.step


@pytest.mark.parametrize("begin", [2, 0.4])
def test_codes_come_into_use_at_a_step_or_a_fraction_and_rest_before(begin: Mark) -> None:
    deferred, diary = make_deferred(begin), Diary()
    start = deferred.tokenizer.quantizer.codes().detach().clone()
    fit(deferred, [diary])
    assert [indices is None for indices in diary.indices] == [True, True, False, False, False]
    assert torch.equal(diary.codes[1], start)
    assert not torch.equal(diary.codes[2], start)
    assert deferred.tokenizer.quantizer.num_updates == 3


def test_the_codes_are_placed_among_what_the_encoder_makes_of_images_by_then() -> None:
    deferred = make_deferred(2)
    fit(deferred, [StopAt(2)])
    quantizer = deferred.tokenizer.quantizer
    vectors = take_vectors(deferred.tokenizer, make_noise(), PLACING * 16)
    expected = make(VQ, 16, 8)
    expected.initialise(vectors)
    assert not torch.equal(expected.codes(), quantizer.codes())
    deferred.trainer.datamodule = make_noise()  # type: ignore[attr-defined]
    deferred.place_codes()
    assert torch.equal(expected.codes(), quantizer.codes())
    assert deferred.quantizes


def test_until_then_the_decoder_sees_what_would_be_compared_with_codes() -> None:
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    cosine, bits, levels = (
        make(EMA, 16, 8, cosine=True),
        make(BSQ, 16),
        make(FSQ, 16, activation="normal"),
    )
    for quantizer in (cosine, bits, levels):
        tokenizer = make_tokenizer(quantizer=quantizer)
        tokenizer.initialise(x)
        z_e = tokenizer.encode_input(x)
        q = tokenizer.encode(x, quantize=False)
        assert q.indices is None
        assert q.loss == 0
        assert torch.equal(q.z_q, q.z_e)
        (of_encoder,) = torch.autograd.grad(q.z_q.sum(), z_e, retain_graph=True, allow_unused=True)
        assert of_encoder is None or of_encoder.isfinite().all()
    torch.testing.assert_close(cosine.bypass(z_of(cosine)).z_q.norm(dim=1), torch.ones(2, 4, 4))
    z = z_of(levels)
    assert torch.equal(levels.bypass(z).z_q, z)
    unit = bits.standardise(bits.bypass(z_of(bits)).z_q)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2, 4, 4))


def z_of(quantizer: Quantizer) -> Tensor:
    torch.manual_seed(1)
    return 3 * torch.randn(2, quantizer.in_dim, 4, 4) + 1


def test_the_average_of_the_codes_begins_where_they_are_placed() -> None:
    deferred, average = make_deferred(3), WeightAverage(0.999)
    fit(deferred, [average, StopAt(4)])
    for name, value in deferred.tokenizer.state_dict().items():
        assert torch.equal(average.values[name], value) == name.startswith("quantizer."), name
    fit(deferred, [average, StopAt(5)])
    assert not torch.equal(
        average.values["quantizer.codebook"], deferred.tokenizer.state_dict()["quantizer.codebook"]
    )


def test_a_continuous_update_trains_both_networks_but_no_code() -> None:
    deferred = make_deferred(3)
    before = {name: p.clone() for name, p in deferred.tokenizer.named_parameters()}
    fit(deferred, [StopAt(2)])
    same = {
        name
        for name, p in deferred.tokenizer.named_parameters()
        if p.ndim > 1 and torch.equal(p, before[name])
    }
    assert same == {"quantizer.codebook"}


def train_in_parts(module: VQGAN, folder: Path, stop: int = STEPS) -> None:
    """Train up to a step, from the checkpoint in a folder if there is one."""
    callbacks: list[Callback] = [
        Checkpoints(make_header("vqgan", {}), stop, pauses=(0, 0)),
        StopAt(stop),
    ]
    trainer = make_trainer(callbacks=callbacks, default_root_dir=folder)
    torch.manual_seed(0)
    last = folder / LAST
    trainer.fit(module, make_noise(), ckpt_path=last if last.is_file() else None)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumed_before_at_or_after_the_moment_equals_an_uninterrupted_one(
    tmp_path: Path, stop: int
) -> None:
    whole, first, second = (make_deferred(2) for _ in range(3))
    train_in_parts(whole, tmp_path / "whole")
    train_in_parts(first, tmp_path / "parts", stop)
    assert first.step == stop
    train_in_parts(second, tmp_path / "parts")
    assert second.step == whole.step == STEPS
    expected, resumed = whole.state_dict(), second.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_codes_that_freeze_when_the_gate_opens_are_placed_before() -> None:
    deferred, diary = make_deferred(4, Gate(start=2, ramp=0, warmup=0)), Diary()
    fit(deferred, [diary])
    assert [indices is None for indices in diary.indices] == [True, True, False, False, False]
    assert torch.equal(diary.codes[2], diary.codes[4])  # frozen, where they were placed
    assert not torch.equal(diary.codes[1], diary.codes[2])


def test_codes_in_use_stay_in_use_whatever_the_clock_says() -> None:
    deferred, diary = make_deferred(3), Diary()
    deferred.tokenizer.quantizer.updates += 7  # as of the run that this one starts with
    fit(deferred, [diary])
    assert all(indices is not None for indices in diary.indices)


def test_a_validation_sees_codes_in_the_continuous_phase_too() -> None:
    """The best checkpoint is the best tokenizer, and a continuous one would beat all later ones."""
    deferred = make_deferred(4)
    trainer = fit(deferred, [StopAt(3)], limit_val_batches=1)
    trainer.validate(deferred, make_noise(), verbose=False)
    assert trainer.callback_metrics["val/codes_used"] > 0


def test_micro_batches_of_a_continuous_update_have_no_codes() -> None:
    deferred, diary = make_deferred(2, accumulate=2), Diary()
    fit(deferred, [diary])
    assert [indices is None for indices in diary.indices] == [True, True, False, False, False]


@pytest.mark.parametrize("begin", [5, 0.9])
def test_codes_that_would_never_come_into_use_are_refused(begin: Mark) -> None:
    with pytest.raises(InputError, match=rf"quantizer.from={begin} is not before the last of .*=5"):
        make_deferred(begin)


def test_a_run_whose_minutes_end_before_its_codes_come_into_use_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    deferred = make_deferred(4)
    deferred.budget = Budget(max_steps=10**6, max_minutes=1e-6)
    fit(deferred)
    assert not deferred.quantizes
    assert "the run ended at step 1, before its codes came into use" in capsys.readouterr().err
    fit(make_deferred(2))
    assert "quantizer.from" not in capsys.readouterr().err


@pytest.mark.parametrize("begin", [-1, 1.0, 1.5, "soon", True, None, math.nan])
def test_what_is_no_moment_of_a_run_is_refused(begin: Any) -> None:
    with pytest.raises(
        InputError, match=rf"quantizer.from={begin} must be a step .* or a fraction"
    ):
        make(FSQ, 16, **{"from": begin})


def test_a_setting_that_no_quantizer_has_is_a_mistake_in_the_program() -> None:
    with pytest.raises(TypeError, match="no setting form"):
        make(VQ, 16, 8, form=1)
    assert check_begin({}) == 0


def test_a_continuous_bottleneck_takes_no_moment() -> None:
    with pytest.raises(TypeError):
        make(KL, 8, **{"from": 0.1})


def test_the_phases_of_a_run_begin_with_the_continuous_one() -> None:
    assert dict(make_deferred(2).phases) == {"continuous": 0, "training": 2}
    assert dict(make_deferred(0).phases) == {"training": 0}
    gate = Gate(start=3, ramp=1, warmup=1)
    phases = make_deferred(1, gate).phases
    assert list(phases) == ["continuous", "before the gate", "discriminator warms up", "gate open"]
    deferred = make_deferred(2)
    for mark, quantizes in ((0, False), (2, True), (4, True)):
        deferred.enter(mark)
        assert deferred.quantizes is quantizes


@pytest.mark.parametrize(("freezes", "quantizes"), [(True, True), (False, False)])
def test_codes_that_come_into_use_behind_the_gate_have_no_phase_before_it(
    freezes: bool, quantizes: bool
) -> None:
    gate = Gate(start=2, ramp=0, warmup=1)
    deferred = make_deferred(4, gate, freeze_codes=freezes)
    assert deferred.phases == {"continuous": 0, "discriminator warms up": 1, "gate open": 2}
    deferred.enter(2)
    assert deferred.quantizes is quantizes  # frozen codes are placed by then
    deferred.enter(1)
    assert not deferred.quantizes


@pytest.mark.parametrize(("mark", "reaches"), [(4, True), (5, False), (0.8, True), (0.81, False)])
def test_a_run_reaches_a_moment_if_an_update_follows_it(mark: Mark, reaches: bool) -> None:
    budget = Budget(max_steps=5)
    assert budget.reaches(mark) is reaches
    updates = [Now(step, step / 5) for step in range(5)]
    assert any(now.reached(mark) for now in updates) is reaches
