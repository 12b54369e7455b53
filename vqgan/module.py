"""The training step of stage 1."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import InputError
from vqgan.clock import Budget, Clocked, MakeOptimizer, Now, Schedule
from vqgan.losses.adversarial import AdaptiveWeight, Gate, LeCam, hinge_discriminator, hinge_generator
from vqgan.losses.perceptual import Features
from vqgan.losses.pixel import Pixel
from vqgan.metrics.codebook import CodebookUse
from vqgan.metrics.reconstruction import Reconstruction
from vqgan.quantizers.base import Quantized
from vqgan.tokenizer import Tokenizer

GENERATOR, DISCRIMINATOR = 0, 1  # the order of the optimizers


class VQGAN(Clocked):
    """A tokenizer trained by reconstruction, and with a discriminator also adversarially (VQGAN, Esser et al. 2021, eq. 4-7).

    Without one (and then without gate and adaptive weight) it is a VQ-VAE. The gate, the learning rate and the end all
    follow this module's own clock. The discriminator keeps its full rate, to follow a generator that slows down.

    With `codes_rest` the adversarial gradient trains the decoder alone: when the gate opens, encoder and codebook stay as
    they are, so that no discriminator can ruin the codes. Without, it reaches the encoder too, as in the paper.
    """

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
        gate: Gate | None = None,
        adaptive: AdaptiveWeight | None = None,
        lecam: LeCam | None = None,
        discriminator_optimizer: MakeOptimizer | None = None,
        codes_rest: bool = True,
        second_peak: float = 0.5,
        clip: float = 1.0,
    ) -> None:
        super().__init__(budget, schedule, clip)
        if discriminator is None and isinstance(perceptual, Features):
            raise InputError("loss/perceptual=features needs a discriminator; use loss=vqgan or loss/perceptual=lpips")
        self.tokenizer, self.pixel, self.perceptual, self.discriminator = tokenizer, pixel, perceptual, discriminator
        self.codes_rest, self.second_peak = codes_rest, second_peak
        self.perceptual_weight, self.gate, self.adaptive, self.lecam = perceptual_weight, gate, adaptive, lecam
        self.make_optimizers = {GENERATOR: optimizer, DISCRIMINATOR: discriminator_optimizer or optimizer}
        self.reconstruction = Reconstruction()
        self.use = CodebookUse(tokenizer.K, tokenizer.books) if tokenizer.K else None

    # One step, one line per sentence of the paper.

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, _labels = batch
        with torch.set_grad_enabled(not self.resting):
            q = self.tokenizer.encode(x)
        x_hat = self.tokenizer.decode(q.z_q)
        self.descend(GENERATOR, self.generator_loss(x, x_hat, q), self.rate)
        if self.gate is not None and self.gate.training(self.now):
            self.descend(DISCRIMINATOR, self.discriminator_loss(x, x_hat.detach()), 1.0)
        if not self.resting:
            self.tokenizer.quantizer.update(q)
        self.tick()

    @property
    def resting(self) -> bool:
        """Whether encoder and codebook rest: with `codes_rest`, from the moment that the gate opens."""
        return self.codes_rest and self.gate is not None and self.gate.open(self.now)

    @property
    def rate(self) -> float:
        """The generator's learning rate as a share of its peak. With `codes_rest` the schedule runs twice: for the codes,
        and from `second_peak` for the decoder alone."""
        if self.gate is None or not self.codes_rest:
            return self.schedule(self.now)
        phase = Now(self.step, self.gate.phase(self.now))
        return self.schedule(phase) * (self.second_peak if self.resting else 1.0)

    def generator_loss(self, x: Tensor, x_hat: Tensor, q: Quantized) -> Tensor:
        """Reconstruction + the bottleneck's loss + lambda * adversarial (eq. 6); what the discriminator says is gated."""
        pixel = self.pixel(x, x_hat)
        self.log_terms({"rec": pixel, "quantizer": q.loss, **q.terms})
        reconstruction = pixel + self.similarity(x, x_hat)
        weight = self.gate.weight(self.now) if self.gate is not None else 0.0
        if self.discriminator is None or self.adaptive is None or not weight:
            return reconstruction + q.loss
        with frozen(self.discriminator):
            fake = self.discriminator(x_hat)
            if isinstance(self.perceptual, Features):
                with torch.no_grad():
                    real = self.discriminator(x)
                features = self.perceptual(real.features, fake.features)
                self.log_terms({"perceptual": features})
                reconstruction = reconstruction + weight * self.perceptual_weight * features
        adversarial = hinge_generator(fake.logits)
        balance = self.adaptive(reconstruction, adversarial, self.tokenizer.decoder.last.weight)
        self.log_terms({"adversarial": adversarial, "gate": torch.tensor(weight), **balance})
        return reconstruction + q.loss + weight * balance["lambda"] * adversarial

    def similarity(self, x: Tensor, x_hat: Tensor) -> Tensor | float:
        """The weighted perceptual loss, where it does not live in the discriminator."""
        if self.perceptual is None or isinstance(self.perceptual, Features):
            return 0.0
        loss: Tensor = self.perceptual(x, x_hat)
        self.log_terms({"perceptual": loss})
        return self.perceptual_weight * loss

    def discriminator_loss(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The hinge loss on real images and on reconstructions without a way back to the generator."""
        assert self.discriminator is not None
        real, fake = self.discriminator(x).logits, self.discriminator(x_hat).logits
        loss = hinge_discriminator(real, fake)
        if self.lecam is not None:
            penalty = self.lecam(real, fake)
            self.log_terms({"lecam": penalty})
            loss = loss + penalty
        self.log_terms({"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()})
        return loss

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
        rates = self.tokenizer.quantizer.parameter_rates()
        players = {GENERATOR: self.tokenizer, DISCRIMINATOR: self.discriminator}
        return [self.optimizer(self.make_optimizers[n], player, rates) for n, player in players.items() if player is not None]


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Inside, the module's parameters ask for no gradient: a loss passes through it and leaves nothing behind."""
    parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
