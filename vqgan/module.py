"""The training step of stage 1."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.clock import Budget, Now, Schedule
from engine.errors import InputError
from engine.module import ClockedModule, MakeOptimizer
from evaluation.codebook import CodebookUse
from evaluation.reconstruction import Reconstruction
from vqgan.discriminators.patch import Judgement
from vqgan.losses.adversarial import Game, Hinge
from vqgan.losses.gate import Gate
from vqgan.losses.perceptual import DiscriminatorFeatures
from vqgan.losses.pixel import Pixel
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import AdaptiveWeight
from vqgan.quantizers.base import Quantized, join_micro_batches
from vqgan.tokenizer import Tokenizer

GENERATOR, DISCRIMINATOR = 0, 1  # the order of the optimizers


class SharedJudgements:
    """Images and their reconstructions, both (B, C, H, W), and what a discriminator says of each, asked when it is first needed.

    Its weights are the same all through a step until its own update, so that what the generator's turn has asked, with the
    way back to the weights, need not be asked again in the discriminator's.
    """

    def __init__(self, judge: Callable[[Tensor], Judgement], x: Tensor, x_hat: Tensor) -> None:
        self._judge, self.x, self.x_hat = judge, x, x_hat

    @cached_property
    def real(self) -> Judgement:
        return self._judge(self.x)

    @cached_property
    def fake(self) -> Judgement:
        return self._judge(self.x_hat)


class MicroBatch(NamedTuple):
    """A micro-batch within a step: images, reconstructions without their graph, the bottleneck's part, and what the
    discriminator says of both, if that is to serve both players."""

    x: Tensor
    x_hat: Tensor
    q: Quantized
    verdicts: SharedJudgements | None


class VQGAN(ClockedModule):
    """A tokenizer trained by reconstruction, and with a discriminator also adversarially (VQGAN, Esser et al. 2021, eq. 4-7).

    Without one (and then without gate and adaptive weight) it is a VQ-VAE. The gate, the learning rates and the end all
    follow this module's own clock. The discriminator's rate stays at its peak unless told otherwise, to follow a generator
    that slows down; what it is shown, image or reconstruction, goes through `augment`.

    With `freeze_codes` the adversarial gradient trains the decoder alone: when the gate opens, encoder and codebook stay as
    they are, so that no discriminator can ruin the codes. Without, it reaches the encoder too, as in the paper.
    """

    players = ("generator", "discriminator")

    def __init__(
        self,
        tokenizer: Tokenizer,
        pixel: Pixel,
        optimizer: MakeOptimizer,
        budget: Budget,
        schedule: Schedule,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial: Game | None = None,
        gate: Gate | None = None,
        adaptive: AdaptiveWeight | None = None,
        lecam: LeCam | None = None,
        r1: R1 | None = None,
        augment: nn.Module | None = None,
        discriminator_optimizer: MakeOptimizer | None = None,
        discriminator_schedule: Schedule | None = None,
        freeze_codes: bool = True,
        second_peak: float = 0.5,
        second_betas: Sequence[float] | None = None,
        clip: float = 1.0,
        accumulate: int = 1,
    ) -> None:
        super().__init__(budget, schedule, clip, accumulate)
        if discriminator is None and isinstance(perceptual, DiscriminatorFeatures):
            raise InputError(
                "loss/perceptual=features needs a discriminator; use loss=vqgan or loss/perceptual=lpips"
            )
        self.tokenizer, self.pixel, self.perceptual, self.discriminator = (
            tokenizer,
            pixel,
            perceptual,
            discriminator,
        )
        self.freeze_codes, self.second_peak, self.second_betas = (
            freeze_codes,
            second_peak,
            second_betas,
        )
        self.perceptual_weight = perceptual_weight
        self.adversarial, self.gate, self.adaptive = adversarial or Hinge(), gate, adaptive
        self.lecam, self.r1, self.augment = lecam or LeCam(0.0), r1 or R1(0.0), augment
        self.make_optimizers = {
            GENERATOR: optimizer,
            DISCRIMINATOR: discriminator_optimizer or optimizer,
        }
        self.discriminator_schedule = discriminator_schedule or Schedule(warmup=0, floor=1.0)
        self.judged, self.judging_since = (
            0,
            0.0,
        )  # the discriminator's updates, and the progress at its first
        self.reconstruction = Reconstruction()
        self.use = CodebookUse(tokenizer.K, tokenizer.num_codebooks) if tokenizer.K else None

    # One step, one line per sentence of the paper.

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> dict[str, Tensor | None]:
        x = self.augmented(batch[0])
        made: list[MicroBatch] = []
        self.descend(GENERATOR, self.generator_losses(x, made), self.rate, self.betas)
        if self.gate is not None and self.gate.training(self.now):
            self.descend(DISCRIMINATOR, self.discriminator_losses(made), self.discriminator_rate)
            self.judged += 1
        q = join_micro_batches([part.q for part in made])
        if not self.resting:
            self.tokenizer.quantizer.update(q, self.rate)
        self.tick()
        return {"indices": q.indices}

    def augmented(self, images: Tensor) -> Tensor:
        """uint8 training images as the datamodule augments them, float in [-1, 1]; images that are float already stay."""
        if images.is_floating_point():
            return images
        augmented: Tensor = self.trainer.datamodule.augment(images)  # type: ignore[attr-defined]
        return augmented

    @property
    def learned(self) -> Tokenizer:
        return self.tokenizer

    @property
    def costly(self) -> list[nn.Module]:
        """What may be compiled: the layers that take most of the time, but the decoder's last, whose gradients lambda wants
        alone. The discriminator's passes differ too much: with and without gradients to its weights, shared and not, R1's."""
        return [self.tokenizer.encoder.layers, self.tokenizer.decoder.layers]

    @property
    def playing(self) -> bool:
        """Whether the discriminator's gradient reaches the generator."""
        players = self.discriminator, self.adaptive, self.gate
        return None not in players and self.gate is not None and self.gate.open(self.now)

    @property
    def resting(self) -> bool:
        """Whether encoder and codebook rest: with `freeze_codes`, from the moment that the gate opens."""
        return self.freeze_codes and self.playing

    @property
    def judges_once(self) -> bool:
        """Whether one judgement of an image serves both players: where the second would be the same, and is near.

        Under an augmentation it would not be, nor with a discriminator that has buffers: spectral norm goes on with its
        estimate whenever it is asked in training. With micro-batches it is far: all their graphs would have to be kept.
        """
        if not self.playing or self.augment is not None or self.accumulate > 1:
            return False
        assert self.discriminator is not None
        return next(self.discriminator.buffers(), None) is None

    @property
    def rate(self) -> float:
        """The generator's learning rate as a share of its peak. With `freeze_codes` the schedule runs twice: for the codes,
        and from `second_peak` for the decoder alone."""
        if self.gate is None or not self.freeze_codes:
            return self.schedule(self.now)
        phase = Now(self.step, self.gate.phase(self.now))
        return self.schedule(phase) * (self.second_peak if self.resting else 1.0)

    @property
    def betas(self) -> Sequence[float] | None:
        """Those of the generator's optimizer when the gate is open, where they change then."""
        return self.second_betas if self.playing else None

    @property
    def discriminator_rate(self) -> float:
        """The discriminator's learning rate as a share of its peak, by a schedule that begins when it does."""
        if not self.judged:
            self.judging_since = self.now.progress
        left = 1 - self.judging_since
        return self.discriminator_schedule(
            Now(self.judged, (self.now.progress - self.judging_since) / left if left else 1.0)
        )

    def generator_losses(self, x: Tensor, made: list[MicroBatch]) -> Iterator[Tensor]:
        """The loss of each micro-batch, which is added to `made`."""
        for part, share in self.micro_batches(x):
            with torch.set_grad_enabled(not self.resting):
                q = self.tokenizer.encode(part)
            x_hat = self.tokenizer.decode(q.z_q)
            verdicts = (
                SharedJudgements(self.judge, part, x_hat.detach().requires_grad_())
                if self.judges_once
                else None
            )
            made.append(MicroBatch(part, x_hat.detach(), q, verdicts))
            yield share * self.generator_loss(part, x_hat, q, share, verdicts)
        if self.adaptive is not None and self.playing:
            self.log_terms(self.adaptive.update())

    def generator_loss(
        self,
        x: Tensor,
        x_hat: Tensor,
        q: Quantized,
        share: float = 1.0,
        verdicts: SharedJudgements | None = None,
    ) -> Tensor:
        """A scalar with the gradient of reconstruction + the bottleneck's loss + lambda * adversarial (eq. 6).

        Each term is gone backward through as far as the reconstruction. There lambda, and who has how much influence, can
        be read off the gradients; only their sum goes on through the decoder. `verdicts` are on x and a leaf of x_hat's values,
        where the discriminator's turn is to use the same judgements.
        """
        leaf, scale = (
            (verdicts.x_hat if verdicts else x_hat.detach().requires_grad_()),
            self.loss_scale,
        )
        with torch.enable_grad():
            terms = self.terms(x, leaf, verdicts)
            slopes = {
                name: torch.autograd.grad(scale * term, leaf, retain_graph=True)[0] / scale
                for name, (_, term) in terms.items()
            }
        pulls = {name: weight * slopes[name] for name, (weight, _) in terms.items()}
        if self.adaptive is not None and "adversarial" in terms:
            last = self.tokenizer.decoder.last.weight
            against = (
                slopes["adversarial"],
                sum_of(pulls[name] for name in pulls if name != "adversarial"),
            )
            adv, rec = (
                torch.autograd.grad(x_hat, last, scale * slope, retain_graph=True)[0].float()
                / scale
                for slope in against
            )
            self.adaptive.measure(rec, adv, share)
        self.log_terms(
            {"quantizer": q.loss, **q.terms, **{name: term for name, (_, term) in terms.items()}}
        )
        lengths = {name: pull.norm() for name, pull in pulls.items()}
        whole = sum_of(lengths.values()) + torch.finfo(torch.float32).tiny
        self.log_terms({f"share_{name}": length / whole for name, length in lengths.items()})
        return (x_hat * sum_of(pulls.values())).sum() + q.loss

    def terms(
        self, x: Tensor, x_hat: Tensor, verdicts: SharedJudgements | None = None
    ) -> dict[str, tuple[float | Tensor, Tensor]]:
        """The losses of the reconstruction that count now, and their weights; what the discriminator says is gated."""
        terms: dict[str, tuple[float | Tensor, Tensor]] = {"rec": (1.0, self.pixel(x, x_hat))}
        if (
            self.perceptual is not None
            and self.perceptual_weight
            and not isinstance(self.perceptual, DiscriminatorFeatures)
        ):
            terms["perceptual"] = self.perceptual_weight, self.perceptual(x, x_hat)
        if not self.playing:
            return terms
        assert self.discriminator is not None
        assert self.adaptive is not None
        assert self.gate is not None
        gate = self.gate.weight(self.now)
        self.log_terms({"gate": torch.tensor(gate)})
        with nullcontext() if verdicts else frozen(self.discriminator):
            verdicts = verdicts or SharedJudgements(self.judge, x, x_hat)
            terms["adversarial"] = (
                gate * self.adaptive.weight,
                self.adversarial.generator(verdicts.fake.logits),
            )
            if isinstance(self.perceptual, DiscriminatorFeatures) and gate * self.perceptual_weight:
                plain = (
                    verdicts
                    if self.augment is None
                    else SharedJudgements(self.discriminator, x, x_hat)
                )
                distance = self.perceptual(plain.real.features, plain.fake.features)
                terms["perceptual"] = gate * self.perceptual_weight, distance
        return terms

    def judge(self, x: Tensor) -> Judgement:
        """What the discriminator says to images or reconstructions, augmented where that is chosen."""
        assert self.discriminator is not None
        judged: Judgement = self.discriminator(x if self.augment is None else self.augment(x))
        return judged

    def discriminator_losses(self, made: list[MicroBatch]) -> Iterator[Tensor]:
        """The loss of each micro-batch, times its share of the update."""
        whole = sum(len(part.x) for part in made)
        for x, x_hat, _, verdicts in made:
            yield len(x) / whole * self.discriminator_loss(x, x_hat, len(x) / whole, verdicts)
        self.lecam.update()

    def discriminator_loss(
        self, x: Tensor, x_hat: Tensor, share: float = 1.0, verdicts: SharedJudgements | None = None
    ) -> Tensor:
        """The game's loss on real images and on reconstructions without a way back to the generator, and the penalties.
        `verdicts` are on both, where the generator's turn has asked already."""
        assert self.discriminator is not None
        verdicts = verdicts or SharedJudgements(self.judge, x, x_hat.detach())
        real, fake = verdicts.real.logits, verdicts.fake.logits
        loss, lecam = self.adversarial.discriminator(real, fake), self.lecam(real, fake, share)
        self.log_terms(
            {
                "discriminator": loss,
                "logits_real": real.mean(),
                "logits_fake": fake.mean(),
                "lecam": lecam,
            }
        )
        if not self.r1.due(self.judged):
            return loss + lecam
        r1 = self.r1(self.discriminator, x)
        self.log_terms({"r1": r1})
        return loss + lecam + r1

    # Validation: over the whole set, on the rounded images that a file would hold.

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, _labels = batch
        q = self.tokenizer.encode(x)
        self.reconstruction.update(x, self.tokenizer.decode(q.z_q))
        if self.use is not None and q.indices is not None:
            self.use.update(q.indices)

    def on_validation_epoch_end(self) -> None:
        for metric in (self.reconstruction, self.use):
            if metric is not None:
                self.log_dict({f"val/{name}": value for name, value in metric.compute().items()})
                metric.reset()

    # Lightning's side.

    def configure_optimizers(self) -> list[Optimizer]:
        rates = self.tokenizer.quantizer.lr_multipliers()
        players = {GENERATOR: self.tokenizer, DISCRIMINATOR: self.discriminator}
        return [
            self.optimizer(self.make_optimizers[n], player, rates)
            for n, player in players.items()
            if player is not None
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["clock"] |= {"judged": self.judged, "judging_since": self.judging_since}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.judged, self.judging_since = (
            checkpoint["clock"]["judged"],
            checkpoint["clock"]["judging_since"],
        )


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(tensors)).sum(0)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, a loss passes through the module and leaves nothing behind: no gradients, no moved running statistics."""
    parameters, training = [p for p in module.parameters() if p.requires_grad], module.training
    for p in parameters:
        p.requires_grad_(False)
    module.eval()  # or spectral norm would go on with its estimate
    try:
        yield
    finally:
        module.train(training)
        for p in parameters:
            p.requires_grad_(True)
