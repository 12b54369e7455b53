"""Whose gradients go where, and who counts the steps."""

import copy
from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from codegrid.engine.clock import Budget, Now, Schedule
from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import (
    fit,
    lightning_warnings,
    make_module,
    make_noise,
    paper_weight,
)
from vqgan.discriminators.base import frozen
from vqgan.discriminators.fine import Fine
from vqgan.discriminators.multiscale import MultiScale
from vqgan.discriminators.patch import PatchGAN
from vqgan.discriminators.style import Style
from vqgan.losses.adversarial import Hinge, LeastSquares, NonSaturating, Vanilla
from vqgan.losses.augment import DiffAugment
from vqgan.losses.gate import Gate
from vqgan.losses.groups import group_losses
from vqgan.losses.micro_batch import MicroBatch
from vqgan.losses.perceptual import DiscriminatorFeatures
from vqgan.losses.pixel import Pixel
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import ConstantWeight
from vqgan.module import VQGAN
from vqgan.quantizers.none import Plain
from vqgan.quantizers.vq import VQ

pytestmark = lightning_warnings


def weights(part: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in part.parameters()]


def same(before: list[Tensor], part: torch.nn.Module) -> bool:
    return all(torch.equal(b, p) for b, p in zip(before, part.parameters(), strict=True))


class Spy(Callback):
    """Copies weights around every optimizer step and records who moved."""

    def __init__(self) -> None:
        self.moved: list[tuple[bool, bool]] = []
        self.gradients: list[tuple[bool, bool]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            return
        spy, descend = self, module.descend

        def watched(which: int, losses: Iterable[Tensor], rate: float, betas: Any = None) -> Tensor:
            assert isinstance(module, VQGAN)
            assert module.discriminator is not None
            players = module.tokenizer, module.discriminator
            before = [weights(player) for player in players]
            for player in players:
                player.zero_grad()
            norm: Tensor = descend(which, losses, rate, betas)
            spy.moved.append((not same(before[0], players[0]), not same(before[1], players[1])))
            grads = [
                any(p.grad is not None and bool(p.grad.any()) for p in player.parameters())
                for player in players
            ]
            spy.gradients.append((grads[0], grads[1]))
            return norm

        module.descend = watched  # type: ignore[method-assign]


def test_a_generator_step_leaves_the_discriminator_untouched_and_the_reverse() -> None:
    spy = Spy()
    fit(make_module(Gate(start=0, ramp=0, warmup=0)), [spy])
    assert spy.moved == [(True, False), (False, True)] * 8
    assert spy.gradients == [(True, False), (False, True)] * 8


def test_the_discriminator_trains_before_its_gradient_reaches_the_generator() -> None:
    trained = make_module(Gate(start=6, ramp=0, warmup=3))
    spy = Spy()
    fit(trained, [spy])
    assert spy.moved == [(True, False)] * 3 + [(True, False), (False, True)] * 5


def test_before_the_gate_opens_a_gan_trains_exactly_like_a_vqvae() -> None:
    closed, plain = (
        make_module(Gate(start=100, ramp=0, warmup=0), freeze_codes=False),
        make_module(),
    )
    fit(closed)
    fit(plain)
    assert same(weights(plain.tokenizer), closed.tokenizer)


def test_after_the_gate_opens_it_does_not() -> None:
    opened, plain = make_module(Gate(start=0, ramp=0, warmup=0)), make_module()
    fit(opened)
    fit(plain)
    assert not same(weights(plain.tokenizer), opened.tokenizer)


def codes(trained: VQGAN) -> dict[str, Tensor]:
    parts = {
        "encoder": trained.tokenizer.encoder,
        "into": trained.tokenizer.into,
        "quantizer": trained.tokenizer.quantizer,
    }
    return {
        f"{name}.{key}": value.clone()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


class Snapshot(Callback):
    """The weights that make codes, as they were when step 4 began."""

    taken: dict[str, Tensor] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, VQGAN)
        if batch_idx == 4:
            self.taken = codes(module)


@pytest.mark.parametrize("freeze_codes", [True, False])
def test_codes_freeze_when_the_gate_opens_only_with_freeze_codes(freeze_codes: bool) -> None:
    trained, snapshot = (
        make_module(Gate(start=4, ramp=0, warmup=2), freeze_codes=freeze_codes),
        Snapshot(),
    )
    before = weights(trained.tokenizer.decoder)
    fit(trained, [snapshot])
    assert snapshot.taken is not None
    after = codes(trained)
    assert (
        all(torch.equal(value, after[name]) for name, value in snapshot.taken.items())
        is freeze_codes
    )
    assert not same(before, trained.tokenizer.decoder)


def test_with_frozen_codes_the_learning_rate_follows_its_schedule_twice() -> None:
    trained = make_module(Gate(start=4, ramp=0, warmup=0), steps=8, second_peak=0.5)
    rates = []
    for trained.step in range(8):
        rates.append(trained.rate)
    cosine = [Schedule(0, 0.02)(Now(9, share)) for share in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0.5 * cosine[0], *cosine[1:], *[0.5 * c for c in cosine]])


@pytest.mark.parametrize("augmented", [False, True])
def test_the_generators_gradient_is_that_of_the_sum_of_its_terms(augmented: bool) -> None:
    """Against the plain way: one loss, one backward pass through everything."""
    m = make_module(
        Gate(start=0, ramp=0, warmup=0),
        perceptual_weight=0.5,
        freeze_codes=False,
        adaptive=ConstantWeight(0.3),
    )
    m.adversary.augment = (
        torch.nn.Flatten(0, 0) if augmented else None
    )  # an augmentation that changes nothing, but rules out shared judgements
    logged: dict[str, Tensor] = {}
    m.log_terms = logged.update  # type: ignore[method-assign]
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    m.generator_loss(MicroBatch(x)).backward()
    balanced = gradients(m.tokenizer)
    m.tokenizer.zero_grad()
    q = m.tokenizer.encode(x)
    x_hat = m.tokenizer.decode(q.z_q)
    fake, real = m.discriminator(x_hat), m.discriminator(x)
    features, adversarial = (
        DiscriminatorFeatures()(real.features, fake.features),
        -fake.logits.mean(),
    )
    (make(Pixel)(x, x_hat) + 0.5 * features + q.loss + 0.3 * adversarial).backward()
    torch.testing.assert_close(balanced, gradients(m.tokenizer), rtol=1e-4, atol=1e-7)
    terms = {
        "rec": make(Pixel)(x, x_hat),
        "perceptual": features,
        "adversarial": adversarial,
        "quantizer": q.loss,
    }
    for name, value in terms.items():
        torch.testing.assert_close(logged[name], value)


OPEN, CLOSED = Gate(start=0, ramp=0, warmup=0), Gate(start=8, ramp=0, warmup=8)

# What the discriminator judges in a step, images and reconstructions: (gate, settings, number of judgements).
JUDGEMENTS: dict[str, tuple[Gate, dict[str, Any], int]] = {
    "gate open": (OPEN, {}, 2),
    "the paper's joint training": (OPEN, {"freeze_codes": False}, 2),
    "without feature matching": (OPEN, {"perceptual": None}, 2),
    "and for R1, of images, in 32 bits": (OPEN, {"r1": R1(0.1, every=1)}, 3),
    "gate closed": (CLOSED, {}, 2),
    "gate closed, micro-batches": (CLOSED, {"accumulate": 2}, 4),
    "or again, micro-batches": (OPEN, {"accumulate": 2}, 8),
    "or again, with memory": (OPEN, {"discriminator": PatchGAN(3, 8, 1, spectral=True)}, 4),
    "or again, augmented, and for features as they are": (OPEN, {"augment": make(DiffAugment)}, 5),
}


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_the_discriminator_judges_each_image_once_a_step(name: str) -> None:
    gate, settings, expected = JUDGEMENTS[name]
    trained, judged = make_module(gate, steps=3, **copy.deepcopy(settings)), []
    trained.discriminator.register_forward_hook(lambda *_: judged.append(trained.step))
    fit(trained)
    assert [judged.count(step) for step in range(3)] == [expected] * 3


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_a_run_that_judges_once_ends_as_one_that_judges_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is in a checkpoint: also what spectral norm has estimated, and what random numbers led to."""
    gate, settings, _ = JUDGEMENTS[name]
    once, again = (
        make_module(gate, steps=4, lecam=make(LeCam, 0.1), **copy.deepcopy(settings))
        for _ in range(2)
    )
    for trained in (once, again):
        trained.make_optimizers = dict.fromkeys(
            (0, 1), lambda p: torch.optim.SGD(p, 0.05)
        )  # Adam would enlarge every rounding
    again.discriminator.load_state_dict(once.discriminator.state_dict())
    fit(once)
    monkeypatch.setattr(VQGAN, "shares_judgements", False)
    fit(again)
    torch.testing.assert_close(once.state_dict(), again.state_dict(), rtol=1e-4, atol=1e-6)


def gradients(part: torch.nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in part.parameters() if p.grad is not None]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [PatchGAN, Fine, MultiScale, Style])
def test_both_players_gradients_from_one_judgement_are_those_of_judgements_of_their_own(
    kind: Any, bf16: bool
) -> None:
    """Against each player's loss written out, one backward pass through everything, with the generator moved in between."""
    sizes = {
        PatchGAN: (3, 8, 1),
        Fine: (16, 3, 8),
        MultiScale: (16, 3, 2, 8, 1),
        Style: (16, 3, 8, 2),
    }
    weight, lecam = ConstantWeight(0.3), make(LeCam, 0.2)
    m = make_module(
        OPEN,
        discriminator=make(kind, *sizes[kind]),
        perceptual_weight=0.5,
        freeze_codes=False,
        adaptive=weight,
        lecam=lecam,
    )
    m.log_terms = lambda _: None  # type: ignore[method-assign]
    lecam.means.copy_(torch.tensor([0.3, -0.2]))
    x, slow = torch.rand(4, 3, 16, 16) * 2 - 1, copy.deepcopy(m)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        part = MicroBatch(x)
        assert m.shares_judgements
        m.generator_loss(part).backward()
        assert gradients(m.discriminator) == []
        generator = gradients(m.tokenizer)
        with torch.no_grad():
            for p in m.tokenizer.parameters():
                p.add_(1.0)
        m.discriminator_loss(part).backward()
        torch.testing.assert_close(gradients(m.tokenizer), generator, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        q = slow.tokenizer.encode(x)
        x_hat = slow.tokenizer.decode(q.z_q)
        fake, real = slow.discriminator(x_hat), slow.discriminator(x)
        features, adversarial = (
            DiscriminatorFeatures()(real.features, fake.features),
            -fake.logits.float().mean(),
        )
        (make(Pixel)(x, x_hat) + 0.5 * features + q.loss + 0.3 * adversarial).backward()
        slow.discriminator.zero_grad()
        reals, fakes = (slow.discriminator(images).logits.float() for images in (x, x_hat.detach()))
        hinge = (torch.relu(1 - reals).mean() + torch.relu(1 + fakes).mean()) / 2
        (
            hinge
            + 0.2
            * (torch.relu(reals + 0.2).square().mean() + torch.relu(0.3 - fakes).square().mean())
        ).backward()
    closely = {"rtol": 0.05, "atol": 2e-3} if bf16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(generator, gradients(slow.tokenizer), **closely)
    torch.testing.assert_close(gradients(m.discriminator), gradients(slow.discriminator), **closely)


def test_the_shares_are_those_of_the_gradients_at_the_reconstruction() -> None:
    m = make_module(Gate(start=0, ramp=0, warmup=0), perceptual=None, adaptive=ConstantWeight(0.3))
    logged: dict[str, Tensor] = {}
    m.log_terms = logged.update  # type: ignore[method-assign]
    part = MicroBatch(torch.rand(4, 3, 16, 16))
    m.generator_loss(part)
    x, x_hat = part.x, part.x_hat.detach().requires_grad_()
    rec = torch.autograd.grad(make(Pixel)(x, x_hat), x_hat)[0].norm()
    adv = 0.3 * torch.autograd.grad(-m.discriminator(x_hat).logits.mean(), x_hat)[0].norm()
    torch.testing.assert_close(
        (logged["share_rec"], logged["share_adversarial"]), (rec / (rec + adv), adv / (rec + adv))
    )


def test_lambda_is_measured_at_the_decoders_last_layer() -> None:
    """VQGAN eq. 7 by one backward pass each, through everything."""
    m = make_module(
        Gate(start=0, ramp=0, warmup=0), perceptual_weight=0.5, adaptive=paper_weight(scale=1.0)
    )
    m.log_terms = lambda _: None  # type: ignore[method-assign]
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    m.generator_loss(MicroBatch(x))
    last, x_hat = m.tokenizer.decoder.last.weight, m.tokenizer.decode(m.tokenizer.encode(x).z_q)
    fake, real = m.discriminator(x_hat), m.discriminator(x)
    rec = make(Pixel)(x, x_hat) + 0.5 * DiscriminatorFeatures()(real.features, fake.features)
    above = torch.autograd.grad(rec, last, retain_graph=True)[0].norm()
    below = torch.autograd.grad(-fake.logits.mean(), last)[0].norm()
    torch.testing.assert_close(m.balancer.update()["lambda"], above / (below + 1e-6))


def test_steps_are_counted_once_though_two_optimizers_step() -> None:
    trained = make_module(Gate(start=3, ramp=0, warmup=0), steps=7)
    trainer = fit(trained)
    assert trained.step == 7
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == 7  # type: ignore[attr-defined]
    assert trainer.global_step == 7 + 4  # Lightning's, which nothing of ours may follow


def test_the_codebook_follows_once_a_step_at_the_learning_rate_of_that_step() -> None:
    trained, rates = make_module(Gate(start=0, ramp=0, warmup=0), steps=5, freeze_codes=False), []
    update = trained.tokenizer.quantizer.update
    trained.tokenizer.quantizer.update = lambda q, rate: (rates.append(rate), update(q, rate))[1]  # type: ignore[method-assign,assign,func-returns-value]
    fit(trained)
    assert rates == [pytest.approx(Schedule(2, 0.02)(Budget(5).now(step, 0))) for step in range(5)]


def test_the_learning_rate_follows_the_schedule() -> None:
    trained = make_module(steps=6)
    trainer = fit(trained)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        1e-3 * Schedule(2, 0.02)(Budget(6).now(5, 0))
    )


def test_the_generators_betas_change_when_the_gate_opens() -> None:
    closed, opened = (
        make_module(Gate(start=start, ramp=0, warmup=0), steps=4, second_betas=[0.5, 0.9])
        for start in (5, 3)
    )
    assert [
        fit(trained).optimizers[0].param_groups[0]["betas"] for trained in (closed, opened)
    ] == [(0.9, 0.999), (0.5, 0.9)]


def test_the_discriminator_has_an_optimizer_of_its_own_at_its_full_rate() -> None:
    trained = make_module(
        Gate(start=0, ramp=0, warmup=0),
        steps=6,
        discriminator_optimizer=lambda p: torch.optim.SGD(p, 0.01),
    )
    trainer = fit(trained)
    assert isinstance(trainer.optimizers[1], torch.optim.SGD)
    assert trainer.optimizers[1].param_groups[0]["lr"] == 0.01


def test_validation_changes_nothing() -> None:
    trained = make_module()
    before = copy.deepcopy(trained.state_dict())
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(trained, make_noise(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_metrics_of_a_validation_cover_the_whole_set() -> None:
    trained = make_module()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    [metrics] = trainer.validate(trained, make_noise(), verbose=False)
    x = make_noise().on_after_batch_transfer(
        (torch.from_numpy(make_noise().samples("val").values), torch.zeros(24)), 0
    )[0]
    counts = trained.tokenizer.indices(x).flatten().bincount(minlength=16).double()
    p = counts / counts.sum()
    assert metrics["val/perplexity"] == pytest.approx(
        float(torch.exp(-torch.xlogy(p, p).sum())), rel=1e-5
    )
    assert metrics["val/codes_used"] == (counts > 0).sum()


def test_frozen_parameters_thaw_even_after_an_error() -> None:
    part = torch.nn.Linear(2, 2)
    part.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(part):
        assert not part.weight.requires_grad
        assert not part.training
        raise RuntimeError
    assert part.weight.requires_grad
    assert part.training
    assert not part.bias.requires_grad  # what was frozen before stays so


def test_discriminator_features_without_a_discriminator_are_refused() -> None:
    with pytest.raises(InputError, match="loss/perceptual=features needs a discriminator"):
        group_losses(make(Pixel), 1.0, perceptual=DiscriminatorFeatures())


@pytest.mark.parametrize("name", ["gate", "adaptive"])
def test_a_discriminator_without_a_gate_or_a_weight_is_refused(name: str) -> None:
    parts = {"discriminator": make(PatchGAN, 3), "gate": OPEN, "adaptive": paper_weight()}
    with pytest.raises(InputError, match=rf"loss.{name}=null .* use loss"):
        group_losses(make(Pixel), 1.0, **{**parts, name: None})


def test_without_a_discriminator_the_rest_of_a_gans_loss_is_a_vqvae() -> None:
    reconstruction, adversary = group_losses(make(Pixel), 0.5, gate=OPEN, adaptive=paper_weight())
    assert reconstruction.perceptual is None
    assert adversary is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_gan_step_works_and_stays_finite_in_every_precision(precision: str) -> None:
    trained = make_module(Gate(start=0, ramp=0, warmup=0), steps=3)
    fit(trained, precision=precision)
    assert all(p.isfinite().all() for p in trained.parameters())
    assert trained.step == 3


def test_codes_can_learn_at_a_rate_of_their_own() -> None:
    trained = make_module()
    trained.tokenizer.quantizer = make(VQ, 16, 8, codebook_lr=10.0)
    fit(trained)
    [optimizer] = trained.configure_optimizers()
    rates = {
        id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]
    }
    assert rates[id(trained.tokenizer.quantizer.codebook)] == pytest.approx(1e-2)
    assert rates[id(trained.tokenizer.into.weight)] == pytest.approx(1e-3)
    assert len(rates) == len(list(trained.tokenizer.parameters()))


def test_a_continuous_bottleneck_trains_without_metrics_of_codes() -> None:
    trained = make_module()
    trained.tokenizer.quantizer, trained.codebook_use = Plain(8), None
    trainer = fit(trained)
    assert "val/psnr" in trainer.callback_metrics
    assert "val/perplexity" not in trainer.callback_metrics
    with pytest.raises(InputError, match="this tokenizer is continuous"):
        trained.tokenizer.indices(torch.randn(1, 3, 16, 16))
    with pytest.raises(InputError, match="this tokenizer is continuous"):
        trained.tokenizer.decode_indices(torch.zeros(1, 4, 4, dtype=torch.int64))


def test_penalties_train_the_discriminator_alone_and_are_logged() -> None:
    gate = Gate(start=0, ramp=0, warmup=0)
    plain, held = make_module(gate), make_module(gate, lecam=make(LeCam, 1.0), r1=R1(1.0, every=2))
    held.discriminator.load_state_dict(plain.discriminator.state_dict())
    for trained in (plain, held):
        trained.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assign]
    part = MicroBatch(torch.randn(4, 3, 16, 16))
    part.x_hat = torch.randn(4, 3, 16, 16, requires_grad=True)
    expected = plain.discriminator_loss(part)
    held.discriminator_loss(part).backward()
    assert part.x_hat.grad is None
    vitals = held.vitals
    torch.testing.assert_close(
        held.discriminator_loss(part), expected + vitals["lecam"] + vitals["r1"]
    )
    assert min(vitals["lecam"], vitals["r1"]) > 0
    held.discriminator_step = 1
    torch.testing.assert_close(
        held.discriminator_loss(part), expected + vitals["lecam"]
    )  # r1 is not due


def parts(trained: VQGAN) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.state_dict().items()}


@pytest.mark.parametrize("freeze_codes", [True, False])
def test_updates_of_micro_batches_equal_those_of_whole_ones(freeze_codes: bool) -> None:
    """Both players, the codebook, lambda and LeCam's means, across the gate; the batch of 4 in 1, 2, 4 and 3 (4 = 2 + 1 + 1)."""

    def trained(accumulate: int) -> VQGAN:
        gate = Gate(start=2, ramp=2, warmup=2)
        weight = paper_weight(scale=1.0, smooth=3)
        module = make_module(
            gate,
            6,
            lecam=make(LeCam, 0.1),
            r1=R1(0.1, every=2),
            adaptive=weight,
            freeze_codes=freeze_codes,
            accumulate=accumulate,
        )
        module.make_optimizers = dict.fromkeys(
            (0, 1), lambda p: torch.optim.SGD(p, 0.05)
        )  # Adam would enlarge every rounding
        fit(module)
        return module

    whole = parts(trained(1))
    for n in (2, 4, 3):
        for name, value in parts(trained(n)).items():
            torch.testing.assert_close(
                value,
                whole[name],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=n, name=name: f"{n} {name}: {m}",
            )


def test_more_micro_batches_than_images_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"trainer.accumulate=9 micro-batches need more than a batch of 4"
    ):
        fit(make_module(accumulate=9))


def test_an_update_is_clipped_to_the_length_that_is_asked_for() -> None:
    for clip, longest in ((1e-3, 1e-3), (0.0, float("inf"))):
        trained, lengths = make_module(steps=1, clip=clip), []
        step = torch.optim.AdamW.step

        def stepping(
            optimizer: Any, *a: Any, step: Any = step, lengths: list[float] = lengths, **k: Any
        ) -> Any:
            grads = [
                p.grad.flatten()
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            ]
            lengths.append(float(torch.cat(grads).norm()))
            return step(optimizer, *a, **k)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", stepping)
            fit(trained)
        assert lengths[0] == pytest.approx(longest, rel=1e-3) if clip else lengths[0] > 1e-3
        assert float(trained.vitals["grad_generator"]) > 1e-3  # the log has the length before


def test_the_discriminators_rate_follows_a_schedule_of_its_own_from_its_first_step() -> None:
    trained = make_module(
        Gate(start=6, ramp=0, warmup=4),
        steps=10,
        discriminator_schedule=Schedule(warmup=2, floor=0.0),
    )
    rates: list[float] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trained.discriminator_step:
                rates.append(trainer.optimizers[1].param_groups[0]["lr"] / 1e-3)

    fit(trained, [Record()])
    cosine = Schedule(0, 0.0)
    assert rates == pytest.approx([cosine(Now(9, i / 8)) * min(1, (i + 1) / 2) for i in range(8)])


@pytest.mark.parametrize("fused", [False, True])
def test_under_float16_losses_are_scaled_and_clipped_as_without(fused: bool) -> None:
    """An update that overflows is left out, and the scale is halved."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, 1e-3, fused=fused)

    trained = make_module(Gate(start=0, ramp=0, warmup=0), steps=4)
    trained.make_optimizers = {0: optimizer, 1: optimizer}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights(trained.tokenizer)
    fit(trained, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert not same(before, trained.tokenizer)
    assert all(p.isfinite().all() for p in trained.parameters())
    assert (
        1e-4 < float(trained.vitals["grad_generator"]) < 10
    )  # of the loss as it is, not as it is scaled
    overflowing = make_module(Gate(start=0, ramp=0, warmup=0), steps=2)
    before, scaler = weights(overflowing.tokenizer), torch.amp.GradScaler("cpu", init_scale=2.0**60)
    fit(overflowing, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert same(before, overflowing.tokenizer)
    assert scaler.get_scale() < 2.0**60
    assert overflowing.broken < 0


@pytest.mark.parametrize(
    "game",
    [Hinge(), Vanilla(), NonSaturating(), LeastSquares()],
    ids=lambda game: type(game).__name__,
)
def test_every_game_steps_both_players_across_the_gate(game: Any) -> None:
    trained = make_module(Gate(start=1, ramp=1, warmup=1), steps=4, adversarial=game)
    fit(trained)
    assert trained.discriminator_step == 4
    assert trained.adaptive.weight > 0
    assert all(p.isfinite().all() for p in trained.parameters())


def test_a_loss_that_is_no_number_ends_the_run_at_the_next_look_and_names_the_step() -> None:
    trained = make_module(steps=8)

    class Spoil(Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 3:
                trained.tokenizer.decoder.last.weight.data[0] = float("nan")

    fit(trained, [Spoil()])
    with pytest.raises(InputError, match="is no number .* since step 3"):
        trained.check()
