"""The training step of stage 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from codegrid.engine.activations import Stretch, checkpoint_activations, join_neighbours
from codegrid.engine.clock import Budget, Mark, Now, Schedule
from codegrid.engine.compile import compile_parts
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.module import ClockedModule, MakeOptimizer
from codegrid.engine.settings import TrainerSettings
from codegrid.evaluation.reconstruction import Reconstruction
from codegrid.evaluation.scores import UNDEFINED
from vqgan.learning import ALL, Learners
from vqgan.lora import count_plain, learning_weight
from vqgan.losses.balancer import Balancer, Term
from vqgan.losses.code_changes import replace_codes
from vqgan.losses.groups import Adversary, CodeTraining, ReconstructionLoss
from vqgan.losses.micro_batch import MicroBatch
from vqgan.losses.regularisers import LeCam
from vqgan.losses.shown import show_colours
from vqgan.networks.base import enlarges
from vqgan.networks.blocks import ActivatedNorm
from vqgan.quantizers.base import Quantized, join_micro_batches
from vqgan.starting import take_vectors
from vqgan.tokenizer import Tokenizer

# The order of the optimizers, of which a run has those that it needs.
GENERATOR, DISCRIMINATOR, CODE_MODEL = 0, 1, 2
PLACING = 4  # times as many vectors as a growing codebook needs, for a start of all codes


@dataclass
class Training:
    """How the generator is trained: its optimizer and learning rate, the run's length, the longest gradient that an update
    follows (0: any), the micro-batches of an update, and which of its parts learn."""

    optimizer: MakeOptimizer
    schedule: Schedule
    budget: Budget
    clip: float
    accumulate: int
    learners: Learners = ALL


class VQGAN(ClockedModule):
    """A tokenizer trained by reconstruction, and with an adversary also adversarially (VQGAN, Esser et al. 2021, eq. 4-7).

    Without an adversary it is a VQ-VAE. The gate, the learning rates and the end of the run all follow this module's own
    clock; `discriminator_step` counts the discriminator's updates. `on_codes` prepares codes and decoder for a prior.
    """

    undefined = UNDEFINED
    discriminator: nn.Module | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        reconstruction: ReconstructionLoss,
        training: Training,
        adversary: Adversary | None = None,
        on_codes: CodeTraining | None = None,
    ) -> None:
        super().__init__(training.budget, training.schedule, training.clip, training.accumulate)
        self.tokenizer, self.reconstruction, self.adversary = tokenizer, reconstruction, adversary
        self.learners = training.learners
        self.learners.rest(tokenizer)
        self.balancer = Balancer(adversary.adaptive if adversary else None)
        # The groups are no modules. Their parts are registered here, under the names that checkpoints have them by.
        for name in ("pixel", "perceptual"):
            self.add_module(name, getattr(reconstruction, name))
        for name in ("discriminator", "adaptive", "lecam", "r1", "augment"):
            self.add_module(name, getattr(adversary, name, None))
        if adversary is None:
            self.lecam = LeCam(
                weight=0.0, decay=0.99
            )  # checkpoints have it without an adversary too
        on_codes = on_codes or CodeTraining()
        self.code_changes, self.code_cost = on_codes.changes, on_codes.cost
        names = {GENERATOR: "generator", DISCRIMINATOR: "discriminator", CODE_MODEL: "code_model"}
        self.players = tuple(names[player] for player in self.networks)
        generator_optimizer = training.optimizer
        self.make_optimizers = {
            GENERATOR: generator_optimizer,
            DISCRIMINATOR: (adversary and adversary.optimizer) or generator_optimizer,
            CODE_MODEL: self.code_cost.make_optimizer if self.code_cost else generator_optimizer,
        }
        self.discriminator_step = 0
        self.discriminator_start = 0.0  # the run's progress at the discriminator's first update
        if not self.budget.reaches(self.begin):
            raise InputError(
                f"quantizer.from={self.begin} is not before the last of trainer.max_steps={self.budget.max_steps} updates, so "
                "the codes would never come into use; use a smaller one"
            )
        # Whether the decoder sees codes, which come into use later if quantizer.from is above 0.
        self.quantizes = not tokenizer.quantizer.begin
        self.scores = Reconstruction()
        self.codebook_use = tokenizer.quantizer.make_code_use() if tokenizer.K else None

    # One step, one line per sentence of the paper.

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> dict[str, Tensor | None]:
        if not self.quantizes and (self.now.reached(self.begin) or self.codes_are_frozen):
            self.place_codes()
        x = self.augment_images(batch[0])
        labels = batch[1].tensor_split(self.accumulate)
        parts = [
            MicroBatch(images, share, own)
            for (images, share), own in zip(self.micro_batches(x), labels, strict=True)
        ]
        if self.learners.any:
            self.descend(GENERATOR, map(self.generator_loss, parts), self.rate, self.betas)
        else:
            self.reconstruct(parts)
        if self.is_adversarial:
            self.log_terms(self.balancer.update())  # lambda for the next update
        if self.discriminator_trains:
            self.update_discriminator(parts)
        if self.counts_cost(parts[0]):
            which = self.players.index("code_model")
            self.descend(which, map(self.code_model_loss, parts), self.rate)
        q = join_micro_batches([part.q for part in parts])
        if self.quantizes and not self.codes_are_frozen:
            self.tokenizer.quantizer.update(q, self.rate)
        self.tick()
        return {"indices": q.indices}

    def place_codes(self) -> None:
        """Fit the codes to what the encoder makes of training images by now, and let the decoder see them from here on."""
        tokenizer, data = self.tokenizer, self.trainer.datamodule  # type: ignore[attr-defined]
        assert tokenizer.K is not None
        tokenizer.quantizer.initialise(take_vectors(tokenizer, data, PLACING * tokenizer.K))
        self.quantizes = True
        self.replaced = ("quantizer.",)
        log_line(f"step {self.step}: the codes come into use, placed among the encoder's outputs")

    def augment_images(self, images: Tensor) -> Tensor:
        """Pixels of training images -> float in [-1, 1], as the datamodule augments them; float images stay as they are."""
        if images.is_floating_point():
            return images
        augmented: Tensor = self.trainer.datamodule.augment(images)  # type: ignore[attr-defined]
        return augmented

    def generator_loss(self, part: MicroBatch) -> Tensor:
        """The part's share of reconstruction + bottleneck + lambda * adversarial (eq. 6): a scalar with their gradient."""
        with torch.set_grad_enabled(not self.encoding_is_frozen):
            part.q = self.tokenizer.encode(part.x, self.quantizes)
        quantizer = self.tokenizer.quantizer
        z_q = self.choose_latents(part)
        x_hat = self.tokenizer.decode(z_q)
        part.x_hat = x_hat.detach().requires_grad_()
        terms = self.compare(part, z_q)
        if self.adversary is not None and self.is_adversarial:
            gate = self.adversary.gate.weight(self.now)
            self.log_terms({"gate": torch.full((), gate, device=self.device)})
            terms |= self.adversary.terms(part, gate, self.shares_judgements)
        last = learning_weight(self.tokenizer.decoder.last)
        gradient, shares = self.balancer.balance(
            terms, part.x_hat, x_hat, last, part.share, self.loss_scale
        )
        losses = {name: term.loss for name, term in terms.items()}
        self.log_terms({"quantizer": part.q.loss, **part.q.terms, **losses, **shares})
        on_codes = part.q.loss
        if self.code_cost is not None and self.counts_cost(part):
            on_codes = on_codes + self.code_cost(quantizer, part.q)
        return part.share * ((x_hat * gradient).sum() + on_codes)

    def choose_latents(self, part: MicroBatch) -> Tensor:
        """What the decoder sees in this update, (B, dim, h, w): z_q, of which changed codes may have replaced some."""
        return replace_codes(self.code_changes, self.tokenizer.quantizer, part.q, part.labels)

    def compare(self, part: MicroBatch, z_q: Tensor) -> dict[str, Term]:
        """The losses at part.x_hat, which is decoded from z_q, other than the adversarial one."""
        return self.reconstruction.terms(part.x, part.x_hat)

    @torch.no_grad()
    def reconstruct(self, parts: Sequence[MicroBatch]) -> None:
        """Leave in `parts` what the discriminator's update reads, where no update of the generator does."""
        for part in parts:
            part.q = self.tokenizer.encode(part.x)
            part.x_hat = self.tokenizer.decode(part.q.z_q)
            terms = self.reconstruction.terms(part.x, part.x_hat)
            self.log_terms({name: term.loss for name, term in terms.items()})

    def update_discriminator(self, parts: Sequence[MicroBatch]) -> None:
        """One update on the images and reconstructions that the generator's update has left in `parts`."""
        assert self.adversary is not None
        if self.discriminator_step == 0:
            self.discriminator_start = self.now.progress
        self.descend(DISCRIMINATOR, map(self.discriminator_loss, parts), self.discriminator_rate)
        self.adversary.lecam.update()
        self.discriminator_step += 1

    def discriminator_loss(self, part: MicroBatch) -> Tensor:
        """The part's share of the discriminator's loss, a scalar."""
        assert self.adversary is not None
        loss, terms = self.adversary.loss(part, self.discriminator_step)
        self.log_terms(terms)
        return part.share * loss

    def code_model_loss(self, part: MicroBatch) -> Tensor:
        """The part's share of the mean nats of its codes under the model that says what they cost, a scalar."""
        assert self.code_cost is not None
        nats = self.code_cost.learn(self.tokenizer.quantizer, part.q)
        self.log_terms({"code_nats": nats})
        return part.share * nats

    # What holds at this moment of the run.

    @property
    def is_adversarial(self) -> bool:
        """Whether the discriminator's gradient reaches the generator."""
        return (
            self.adversary is not None and self.learners.any and self.adversary.gate.open(self.now)
        )

    @property
    def discriminator_trains(self) -> bool:
        if self.adversary is None:
            return False
        return not self.learners.any or self.adversary.gate.training(self.now)

    @property
    def freezes_codes(self) -> bool:
        """Whether encoder and codebook stop learning when the gate opens."""
        return self.adversary is not None and self.adversary.second_phase.freeze_codes

    @property
    def codes_are_frozen(self) -> bool:
        return not self.learners.codes or self.encoding_is_frozen

    @property
    def encoding_is_frozen(self) -> bool:
        """Whether neither encoder nor codes learn."""
        if self.freezes_codes and self.is_adversarial:
            return True
        return not (self.learners.encoder or self.learners.codes)

    def counts_cost(self, part: MicroBatch) -> bool:
        """Whether what codes cost is a loss of the encoder in this update."""
        has_codes = part.q.indices is not None
        return self.code_cost is not None and has_codes and not self.encoding_is_frozen

    @property
    def shares_judgements(self) -> bool:
        """Whether one judgement of an image serves both players: if the discriminator's own would be equal, and is next.
        With micro-batches all their graphs would have to be kept until then."""
        return self.adversary is not None and self.adversary.is_repeatable and self.accumulate == 1

    @property
    def rate(self) -> float:
        """The generator's learning rate as a share of its peak. If codes freeze, the schedule runs twice: for the codes until
        the gate opens, then for the decoder alone."""
        if self.adversary is None or not self.freezes_codes:
            return self.schedule(self.now)
        phase = Now(self.step, self.adversary.gate.phase(self.now))
        peak = self.adversary.second_phase.peak if self.is_adversarial else 1.0
        return self.schedule(phase) * peak

    @property
    def betas(self) -> Sequence[float] | None:
        """Those of the generator's optimizer, if they change when the gate opens and it is open."""
        if self.adversary is None or not self.is_adversarial:
            return None
        return self.adversary.second_phase.betas

    @property
    def discriminator_rate(self) -> float:
        """The discriminator's learning rate as a share of its peak, by a schedule that begins with its first update."""
        assert self.adversary is not None
        left = 1 - self.discriminator_start
        progress = (self.now.progress - self.discriminator_start) / left if left else 1.0
        return self.adversary.schedule(Now(self.discriminator_step, progress))

    @property
    def begin(self) -> Mark:
        """When the codes come into use."""
        return self.tokenizer.quantizer.begin

    @property
    def phases(self) -> Mapping[str, Mark]:
        phases, begin = super().phases, self.begin
        gate = self.adversary.gate if self.adversary is not None and self.learners.any else None
        if gate is not None:
            phases = gate.list_phases(self.budget)
        if not begin:
            return phases
        if gate is not None and gate.training(
            self.budget.now_at(begin)
        ):  # there are no codes before
            phases = {name: mark for name, mark in phases.items() if mark}
        return {"continuous": 0} | {name: mark or begin for name, mark in phases.items()}

    def enter(self, mark: Mark) -> None:
        super().enter(mark)
        self.quantizes = self.now.reached(self.begin) or self.codes_are_frozen
        self.discriminator_step = 0  # at which all that is due every n updates is due

    # Validation: over the whole set, on images rounded to the depth of their pixels, as a file would hold them.

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, _labels = batch
        q = self.tokenizer.encode(x)
        self.judge(x, q, self.tokenizer.decode(q.z_q))
        if self.codebook_use is not None and q.indices is not None:
            self.codebook_use.update(q.indices)

    def judge(self, x: Tensor, q: Quantized, x_hat: Tensor) -> None:
        """Count a batch of validation images, their codes and their reconstructions in the scores."""
        self.scores.update(x, x_hat, self.tokenizer.rules.depth)

    def show_versions(self, x: Tensor) -> list[Tensor]:
        """Images, and what pictures of a validation show below them, each (B, C, H, W)."""
        return [x, self.tokenizer.decode(self.tokenizer.encode(x).z_q)]

    def on_validation_epoch_end(self) -> None:
        for metric in self.metrics:
            self.log_dict({f"val/{name}": value for name, value in metric.compute().items()})
            metric.reset()

    @property
    def metrics(self) -> list[Metric | MetricCollection]:
        """The scores that a validation computes."""
        return [each for each in (self.scores, self.codebook_use) if each is not None]

    # Lightning's side.

    def on_fit_start(self) -> None:
        super().on_fit_start()
        images = self.trainer.datamodule  # type: ignore[attr-defined]
        self.tokenizer.rules, self.tokenizer.fit = images.rules, images.form.fit
        if sentence := show_colours(self, images.channels, images.rules.show):
            log_line(sentence)

    def on_train_start(self) -> None:
        super().on_train_start()
        # Codes of a run that is resumed, or that this one starts with, have been in use.
        self.quantizes |= self.tokenizer.quantizer.num_updates > 0
        self.learners.stop_noise(self.tokenizer)

    def on_train_end(self) -> None:
        super().on_train_end()
        if not self.quantizes and self.now.progress >= 1:  # its minutes were over before its steps
            log_line(
                f"quantizer.from={self.begin}: the run ended at step {self.step}, before its codes came into use, so they are "
                "those of its start, which no decoder has seen; use a fraction of the run, such as quantizer.from=0.1"
            )

    @property
    def learned(self) -> Tokenizer:
        return self.tokenizer

    def count_parameters(self) -> int:
        return count_plain(self.tokenizer)

    @property
    def recomputed(self) -> list[nn.Module | Stretch]:
        """The parts whose activations the backward pass may compute again, and within them those that are computed twice. The
        decoder's last convolution is none of them, so lambda's gradients there compute nothing again."""
        parts: list[nn.Module | Stretch] = []
        for network, shrinks in ((self.tokenizer.encoder, True), (self.tokenizer.decoder, False)):
            blocks = network.recomputed
            parts += join_neighbours(network.layers, blocks, filter(enlarges, blocks), shrinks)
            parts += [
                part
                for block in blocks
                for part in block.modules()
                if isinstance(part, ActivatedNorm)
            ]
        return parts

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling: the layers that take most of the time, without the decoder's last, whose gradients lambda
        needs on their own. The discriminator's passes vary too much: with gradients to its weights, without, and R1's."""
        return [self.tokenizer.encoder.layers, self.tokenizer.decoder.layers]

    @property
    def networks(self) -> dict[int, nn.Module]:
        """What has an optimizer, in the order of the optimizers."""
        everything = {
            GENERATOR: self.tokenizer,
            DISCRIMINATOR: self.discriminator,
            CODE_MODEL: self.code_cost,
        }
        return {player: network for player, network in everything.items() if network is not None}

    def configure_optimizers(self) -> list[Optimizer]:
        rates = self.tokenizer.quantizer.lr_multipliers()
        ends = [self.tokenizer.quantizer, self.tokenizer.decoder.last]
        return [
            self.optimizer(self.make_optimizers[player], network, rates, ends=ends)
            for player, network in self.networks.items()
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["clock"] |= {
            "judged": self.discriminator_step,
            "judging_since": self.discriminator_start,
            "draws": self.tokenizer.quantizer.draws,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.discriminator_step = checkpoint["clock"]["judged"]
        self.discriminator_start = checkpoint["clock"]["judging_since"]
        self.tokenizer.quantizer.draws = checkpoint["clock"].get("draws", 0)  # none in older files


def prepare_layers(module: VQGAN, training: TrainerSettings) -> None:
    """What the run's config asks of the networks' layers before they train."""
    module.learners.adapt(module.tokenizer)
    if training.checkpoint_activations:
        checkpoint_activations(module)
    if training.compile:
        compile_parts(module.costly)
