"""Whose gradients go where, and who counts the steps."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.loading import Samples
from tests.vqgan.test_tokenizer import tokenizer
from vqgan.clock import Budget, Now, Schedule
from vqgan.discriminators.patch import PatchGAN
from vqgan.losses.adversarial import AdaptiveWeight, Gate, LeCam
from vqgan.losses.perceptual import Features
from vqgan.losses.pixel import Pixel
from vqgan.module import VQGAN, frozen
from vqgan.quantizers.none import Plain
from vqgan.quantizers.vq import VQ


class Noise(ImageDataModule):
    def load(self, split: str) -> Samples:
        images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        return Samples(images.numpy(), torch.zeros(24).numpy())


def noise() -> Noise:
    return Noise(16, 3, 4, True, 0, 0, "cache")


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3)


def module(gate: Gate | None = None, steps: int = 8, **settings: Any) -> VQGAN:
    torch.manual_seed(0)
    found = tokenizer()
    found.start(noise().augment(torch.from_numpy(noise().split("train").values)))
    if gate is not None:
        settings = {"discriminator": PatchGAN(3, 8, 1), "perceptual": Features(), "adaptive": AdaptiveWeight(), **settings}
    return VQGAN(found, Pixel(), adamw, Budget(steps), Schedule(2), gate=gate, **settings)


def fit(trained: VQGAN, callbacks: Sequence[Callback] = (), **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip
    torch.manual_seed(0)  # the same augmentation, whatever was built before
    trainer.fit(trained, noise())
    return trainer


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*logging on a CPU")


def weights(part: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in part.parameters()]


def same(before: list[Tensor], part: torch.nn.Module) -> bool:
    return all(torch.equal(b, p) for b, p in zip(before, part.parameters(), strict=True))


class Spy(Callback):
    """Copies weights around every optimizer step and says who moved."""

    def __init__(self) -> None:
        self.moved: list[tuple[bool, bool]] = []
        self.gradients: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        spy, descend = self, module.descend

        def watched(which: int, loss: Tensor, rate: float) -> Tensor:
            assert isinstance(module, VQGAN)
            assert module.discriminator is not None
            players = module.tokenizer, module.discriminator
            before = [weights(player) for player in players]
            for player in players:
                player.zero_grad()
            norm: Tensor = descend(which, loss, rate)
            spy.moved.append((not same(before[0], players[0]), not same(before[1], players[1])))
            grads = [any(p.grad is not None and bool(p.grad.any()) for p in player.parameters()) for player in players]
            spy.gradients.append((grads[0], grads[1]))
            return norm

        module.descend = watched  # type: ignore[method-assign]


def test_a_generator_step_leaves_the_discriminator_untouched_and_the_reverse() -> None:
    spy = Spy()
    fit(module(Gate(start=0, ramp=0, warmup=0)), [spy])
    assert spy.moved == [(True, False), (False, True)] * 8
    assert spy.gradients == [(True, False), (False, True)] * 8


def test_the_discriminator_trains_before_its_gradient_reaches_the_generator() -> None:
    trained = module(Gate(start=6, ramp=0, warmup=3))
    spy = Spy()
    fit(trained, [spy])
    assert spy.moved == [(True, False)] * 3 + [(True, False), (False, True)] * 5


def test_before_the_gate_opens_a_gan_trains_exactly_like_a_vqvae() -> None:
    closed, plain = module(Gate(start=100, ramp=0, warmup=0), codes_rest=False), module()
    fit(closed)
    fit(plain)
    assert same(weights(plain.tokenizer), closed.tokenizer)


def test_after_the_gate_opens_it_does_not() -> None:
    opened, plain = module(Gate(start=0, ramp=0, warmup=0)), module()
    fit(opened)
    fit(plain)
    assert not same(weights(plain.tokenizer), opened.tokenizer)


def codes(trained: VQGAN) -> dict[str, Tensor]:
    parts = {"encoder": trained.tokenizer.encoder, "into": trained.tokenizer.into, "quantizer": trained.tokenizer.quantizer}
    return {f"{part}.{name}": value.clone() for part, found in parts.items() for name, value in found.state_dict().items()}


class Snapshot(Callback):
    """The weights that make codes, as they were when step 4 began."""

    taken: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, VQGAN)
        if batch_idx == 4:
            self.taken = codes(module)


@pytest.mark.parametrize("codes_rest", [True, False])
def test_codes_rest_when_the_gate_opens_unless_told_otherwise(codes_rest: bool) -> None:
    trained, snapshot = module(Gate(start=4, ramp=0, warmup=2), codes_rest=codes_rest), Snapshot()
    before = weights(trained.tokenizer.decoder)
    fit(trained, [snapshot])
    assert snapshot.taken is not None
    after = codes(trained)
    assert all(torch.equal(value, after[name]) for name, value in snapshot.taken.items()) is codes_rest
    assert not same(before, trained.tokenizer.decoder)


def test_with_resting_codes_the_learning_rate_runs_its_course_twice() -> None:
    trained = module(Gate(start=4, ramp=0, warmup=0), steps=8, second_peak=0.5)
    rates = []
    for trained.step in range(8):
        rates.append(trained.rate)
    cosine = [Schedule(0)(Now(9, share)) for share in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0.5 * cosine[0], *cosine[1:], *[0.5 * c for c in cosine]])


def test_the_generator_loss_is_the_sum_of_its_terms() -> None:
    m = module(Gate(start=0, ramp=0, warmup=0), perceptual_weight=0.5)
    logged: dict[str, Tensor] = {}
    m.log_terms = logged.update  # type: ignore[method-assign]
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    q = m.tokenizer.encode(x)
    total = m.generator_loss(x, m.tokenizer.decode(q.z_q), q)
    expected = logged["rec"] + 0.5 * logged["perceptual"] + logged["quantizer"] + logged["lambda"] * logged["adversarial"]
    torch.testing.assert_close(total, expected)


def test_steps_are_counted_once_though_two_optimizers_step() -> None:
    trained = module(Gate(start=3, ramp=0, warmup=0), steps=7)
    trainer = fit(trained)
    assert trained.step == 7
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == 7  # type: ignore[attr-defined]
    assert trainer.global_step == 7 + 4  # Lightning's, which nothing of ours may follow


def test_the_codebook_follows_once_a_step() -> None:
    trained, updates = module(Gate(start=0, ramp=0, warmup=0), steps=5, codes_rest=False), []
    update = trained.tokenizer.quantizer.update
    trained.tokenizer.quantizer.update = lambda q: (updates.append(q), update(q))[1]  # type: ignore[method-assign,assign,func-returns-value]
    fit(trained)
    assert len(updates) == 5


def test_the_learning_rate_follows_the_schedule() -> None:
    trained = module(steps=6)
    trainer = fit(trained)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * Schedule(2)(Budget(6).now(5, 0)))


def test_the_discriminator_has_an_optimizer_of_its_own_at_its_full_rate() -> None:
    trained = module(Gate(start=0, ramp=0, warmup=0), steps=6, discriminator_optimizer=lambda p: torch.optim.SGD(p, 0.01))
    trainer = fit(trained)
    assert isinstance(trainer.optimizers[1], torch.optim.SGD)
    assert trainer.optimizers[1].param_groups[0]["lr"] == 0.01


def test_validation_changes_nothing() -> None:
    trained = module()
    before = copy.deepcopy(trained.state_dict())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(trained, noise(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_metrics_of_a_validation_cover_the_whole_set() -> None:
    trained = module()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    [found] = trainer.validate(trained, noise(), verbose=False)
    x = noise().on_after_batch_transfer((torch.from_numpy(noise().split("val").values), torch.zeros(24)), 0)[0]
    counts = trained.tokenizer.indices(x).flatten().bincount(minlength=16).double()
    p = counts / counts.sum()
    assert found["val/perplexity"] == pytest.approx(float(torch.exp(-torch.xlogy(p, p).sum())), rel=1e-5)
    assert found["val/codes_used"] == (counts > 0).sum()


def test_frozen_parameters_thaw_even_after_an_error() -> None:
    part = torch.nn.Linear(2, 2)
    part.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(part):
        assert not part.weight.requires_grad
        raise RuntimeError
    assert part.weight.requires_grad
    assert not part.bias.requires_grad  # what was frozen before stays so


def test_discriminator_features_without_a_discriminator_are_refused() -> None:
    with pytest.raises(InputError, match="loss/perceptual=features needs a discriminator"):
        VQGAN(tokenizer(), Pixel(), adamw, Budget(1), Schedule(), perceptual=Features())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_gan_step_works_and_stays_finite_in_every_precision(precision: str) -> None:
    trained = module(Gate(start=0, ramp=0, warmup=0), steps=3)
    fit(trained, precision=precision)
    assert all(p.isfinite().all() for p in trained.parameters())
    assert trained.step == 3


def test_codes_can_learn_at_a_rate_of_their_own() -> None:
    trained = module()
    trained.tokenizer.quantizer = VQ(16, 8, codebook_lr=10.0)
    fit(trained)
    [made] = trained.configure_optimizers()
    rates = {id(p): group["initial_lr"] for group in made.param_groups for p in group["params"]}
    assert rates[id(trained.tokenizer.quantizer.codebook)] == pytest.approx(1e-2)
    assert rates[id(trained.tokenizer.into.weight)] == pytest.approx(1e-3)
    assert len(rates) == len(list(trained.tokenizer.parameters()))


def test_a_continuous_bottleneck_trains_without_metrics_of_codes() -> None:
    trained = module()
    trained.tokenizer.quantizer, trained.use = Plain(8), None
    trainer = fit(trained)
    assert "val/psnr" in trainer.callback_metrics
    assert "val/perplexity" not in trainer.callback_metrics
    with pytest.raises(InputError, match="this tokenizer is continuous"):
        trained.tokenizer.indices(torch.randn(1, 3, 16, 16))
    with pytest.raises(InputError, match="this tokenizer is continuous"):
        trained.tokenizer.decode_indices(torch.zeros(1, 4, 4, dtype=torch.int64))


def test_lecam_trains_the_discriminator_alone_and_is_logged() -> None:
    plain, held = (module(Gate(start=0, ramp=0, warmup=0), lecam=lecam) for lecam in (None, LeCam(1.0)))
    for trained in (plain, held):
        trained.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assign]
    x, x_hat = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    held.discriminator.load_state_dict(plain.discriminator.state_dict())
    assert held.discriminator_loss(x, x_hat) > plain.discriminator_loss(x, x_hat)
    assert held.lecam.real != 0
