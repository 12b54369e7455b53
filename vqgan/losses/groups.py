"""The parts of conf/loss in two groups, as the training step takes them: the reconstruction's losses and the adversary."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from codegrid.engine.clock import Schedule
from codegrid.engine.errors import InputError, check_range
from codegrid.engine.module import MakeOptimizer
from vqgan.discriminators.base import Judgement, frozen
from vqgan.learning import Learners
from vqgan.losses.adversarial import Game, Hinge
from vqgan.losses.balancer import ADVERSARIAL, Term
from vqgan.losses.code_changes import CodeChange, Perturb
from vqgan.losses.code_cost import CodeCost
from vqgan.losses.code_models import CodeModel
from vqgan.losses.gate import Gate
from vqgan.losses.micro_batch import MicroBatch
from vqgan.losses.perceptual import DiscriminatorFeatures
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import AdaptiveWeight
from vqgan.tokenizer import Tokenizer


@dataclass
class ReconstructionLoss:
    """What compares a reconstruction with its image. `perceptual` is None for pixels alone, and where the perceptual distance
    is in the discriminator's features, which are the adversary's."""

    pixel: nn.Module
    perceptual: nn.Module | None
    perceptual_weight: float

    def terms(self, x: Tensor, x_hat: Tensor) -> dict[str, Term]:
        """The losses of x_hat against x, both (B, C, H, W)."""
        terms = {"rec": Term(1.0, self.pixel(x, x_hat))}
        if self.perceptual is not None and self.perceptual_weight:
            terms["perceptual"] = Term(self.perceptual_weight, self.perceptual(x, x_hat))
        return terms


@dataclass
class SecondPhase:
    """How the generator trains once the gate is open.

    With `freeze_codes` the adversarial gradient trains the decoder alone: encoder and codebook stay as they are, so that no
    discriminator can ruin the codes. Without, it reaches the encoder too, as in the paper.

    peak    the decoder's learning rate under frozen codes, as a share of the first peak
    betas   of the generator's optimizer; None: as before
    """

    freeze_codes: bool
    peak: float
    betas: Sequence[float] | None


@dataclass
class Adversary:
    """A discriminator and the rules of its game against the generator (VQGAN, Esser et al. 2021, eq. 5-7).

    game        the loss of each player
    gate        when the discriminator trains, and how much of its gradient reaches the generator
    adaptive    lambda
    features    the perceptual distance in the discriminator's features, if that is the chosen one, and its weight
    augment     what images and reconstructions pass through before they are judged, or None
    optimizer   the discriminator's own, or None for that of the generator
    schedule    of the discriminator's learning rate, in its own updates
    """

    discriminator: nn.Module
    game: Game
    gate: Gate
    adaptive: AdaptiveWeight
    lecam: LeCam
    r1: R1
    second_phase: SecondPhase
    schedule: Schedule
    features: DiscriminatorFeatures | None = None
    features_weight: float = 0.0
    augment: nn.Module | None = None
    optimizer: MakeOptimizer | None = None

    def judge(self, x: Tensor) -> Judgement:
        """The discriminator's judgement of images or reconstructions (B, C, H, W), augmented if so chosen."""
        judgement: Judgement = self.discriminator(x if self.augment is None else self.augment(x))
        return judgement

    def terms(self, part: MicroBatch, gate: float, share_judgements: bool) -> dict[str, Term]:
        """The generator's losses at part.x_hat, with the gate opened by this much, 0 to 1.

        With `share_judgements` the judgements have a graph to the discriminator's weights and stay in `part` for its own
        update. Otherwise the discriminator is frozen meanwhile and judges again later.
        """
        with nullcontext() if share_judgements else frozen(self.discriminator):
            real, fake = None, self.judge(part.x_hat)
            terms = {ADVERSARIAL: Term(gate, self.game.generator(fake.logits))}
            if self.features is not None and gate * self.features_weight:
                real = self.discriminator(part.x)
                plain = fake if self.augment is None else self.discriminator(part.x_hat)
                distance = self.features(real.features, plain.features)
                terms["perceptual"] = Term(gate * self.features_weight, distance)
        if share_judgements:
            part.real, part.fake = real, fake
        return terms

    def loss(self, part: MicroBatch, update: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, a scalar, in its update number `update`, and the terms for the log. Nothing reaches the
        generator."""
        real = (part.real or self.judge(part.x)).logits
        fake = (part.fake or self.judge(part.x_hat.detach())).logits
        game, lecam = self.game.discriminator(real, fake), self.lecam(real, fake, part.share)
        terms = {"discriminator": game, "logits_real": real.mean(), "logits_fake": fake.mean()}
        terms["lecam"] = lecam
        if not self.r1.due(update):
            return game + lecam, terms
        r1 = self.r1(self.discriminator, part.x)
        return game + lecam + r1, {**terms, "r1": r1}

    @property
    def is_repeatable(self) -> bool:
        """Whether a second judgement within a step would equal the first. Not under an augmentation, and not with buffers:
        spectral norm refines its estimate with every call in training mode."""
        return self.augment is None and next(self.discriminator.buffers(), None) is None


def group_losses(
    pixel: nn.Module,
    perceptual_weight: float,
    perceptual: nn.Module | None = None,
    discriminator: nn.Module | None = None,
    **game: Any,
) -> tuple[ReconstructionLoss, Adversary | None]:
    """The parts of conf/loss, by their names there, in groups; no adversary without a discriminator."""
    features = perceptual if isinstance(perceptual, DiscriminatorFeatures) else None
    if features is not None:
        perceptual = None
    reconstruction = ReconstructionLoss(pixel, perceptual, perceptual_weight)
    if discriminator is None:
        if features is not None:
            raise InputError(
                "loss/perceptual=features needs a discriminator; use loss=vqgan or loss/perceptual=lpips"
            )
        return reconstruction, None
    for name, remedy in (("gate", "loss=vqvae"), ("adaptive", "loss/adaptive=constant")):
        if game.get(name) is None:
            raise InputError(f"loss.{name}=null leaves the discriminator without it; use {remedy}")
    adversary = Adversary(
        discriminator,
        game=game.get("adversarial") or Hinge(),
        gate=game["gate"],
        adaptive=game["adaptive"],
        lecam=game.get("lecam") or LeCam(weight=0.0, decay=0.99),
        r1=game.get("r1") or R1(weight=0.0, every=16),
        second_phase=SecondPhase(
            game["freeze_codes"], game["second_peak"], game.get("second_betas")
        ),
        schedule=game.get("discriminator_schedule") or Schedule(warmup=0, floor=1.0),
        features=features,
        features_weight=perceptual_weight,
        augment=game.get("augment"),
        optimizer=game.get("discriminator_optimizer"),
    )
    return reconstruction, adversary


@dataclass
class CodeTraining:
    """What training does with the codes for the sake of a prior: other codes for the decoder, and what they cost."""

    changes: Sequence[CodeChange] = ()
    cost: CodeCost | None = None


def group_code_losses(
    tokenizer: Tokenizer, learners: Learners, redraw: CodeChange | None, **losses: Any
) -> CodeTraining:
    """Those parts of conf/loss that are about codes, by their names in conf/loss/on_codes, and `redraw`. Runs of earlier
    versions have none. Raises InputError for what this tokenizer, or one that learns only in part, can't have."""
    share, cost = losses.get("perturb") or 0.0, losses.get("code_cost") or 0.0
    check_range("loss.perturb", share, 0, 1)
    check_range("loss.code_cost", cost, 0)
    for name, value in (("perturb", share), ("code_cost", cost)):
        if value and tokenizer.K is None:
            raise InputError(
                f"loss.{name}={value} is about codes, and this tokenizer is continuous (quantizer=none or kl); use loss.{name}=0"
            )
        if value and not tokenizer.quantizer.is_gridded:
            raise InputError(
                f"loss.{name}={value} is for codes of one grid, and those of quantizer=multiscale are of several; use loss.{name}=0"
            )
    if cost and tokenizer.quantizer.nested:
        raise InputError(
            f"loss.code_cost={cost} is the cost of all codes of an image, and quantizer.nested={tokenizer.quantizer.nested} leaves "
            "some out; use loss.code_cost=0 or quantizer.nested=0"
        )
    changes = [] if redraw is None else [redraw]
    if share:
        changes.append(Perturb(share, losses["perturb_nearest"]))
    for change in changes:
        change.check(tokenizer, learners)
    if not cost:
        return CodeTraining(changes)
    if not learners.encoder:
        raise InputError(
            f"loss.code_cost={cost} teaches the encoder cheaper codes, and here it rests; use loss.code_cost=0 or learn=all"
        )
    if (make_model := losses.get("code_model")) is None:
        raise InputError(
            f"loss.code_cost={cost} is the cost under a small model; use loss/code_model=neighbours"
        )
    model: CodeModel = make_model(tokenizer.K, tokenizer.num_codebooks, tokenizer.grid)
    optimizer: MakeOptimizer = losses["code_optimizer"]
    return CodeTraining(changes, CodeCost(cost, losses["code_softness"], model, optimizer))
