"""Alarms for silent failures of stage 1."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from codegrid.engine.callbacks.alarms import Alarms, Sign
from codegrid.engine.collectives import all_gather, all_reduce_mean, own_entry
from codegrid.engine.errors import check_range
from codegrid.evaluation.codebook import CodebookUse
from vqgan.module import VQGAN
from vqgan.quantizers.multi_codebook import MultiCodebook
from vqgan.quantizers.multiscale import MultiScaleResidual

TOKENS_PER_CODE = (
    10  # counted before the use of a codebook is judged: in fewer, a rare code looks unused
)
LEAST_OF_SCALE = 1.5  # perplexity of one scale of a multi-scale tokenizer
ENOUGH_OF_SCALE = 100  # codes by which it is judged
SHARE_SETTINGS = {  # loss term -> the setting that gives it more influence
    "rec": "loss.pixel.l2",
    "perceptual": "loss.perceptual_weight",
    "adversarial": "loss.adaptive.scale",
}


class TokenizerDoctor(Alarms):
    """Examines a run of stage 1 every `every` updates, and reports what `patience` examinations in a row agree on.

    * the codebook has collapsed: under `least_used` of its K codes are in use, or its perplexity is under 1% of K; of several
      scales also if one of them has a perplexity under LEAST_OF_SCALE
    * lambda is at its cap, or `factor` times more or less than when the gate was first fully open
    * the discriminator is dead, its loss within 1% of a blind one's, or saturated, its loss under 1% of that
    * a loss term has under `least_share` of the gradient at the reconstruction

    It examines means, over the updates since the last examination, of the logged terms. Codes are counted over as many
    updates as would show each code of a codebook ten times if all were used alike; train/perplexity and the like are of the last
    count.
    """

    def __init__(
        self,
        every: int,
        patience: int,
        least_used: float = 0.1,
        factor: float = 100.0,
        least_share: float = 1e-4,
    ) -> None:
        super().__init__(every, patience)
        check_range("callbacks.doctor.least_used", least_used, 0, 1)
        check_range("callbacks.doctor.factor", factor, 1)
        check_range("callbacks.doctor.least_share", least_share, 0, 1)
        self.least_used, self.factor, self.least_share = least_used, factor, least_share
        self._sums: dict[str, tuple[Tensor, int]] = {}  # of each term since the last examination
        self._codes: CodebookUse | None = None
        self._counts: Tensor | None = None  # of the codes, from the checkpoint
        self.codebook_figures: dict[str, float] = {}  # of the last complete count
        self._collapse: Sign | None = None  # by the last complete count
        self._usual_lambda: float | None = None  # when the gate was first fully open

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        assert isinstance(module, VQGAN)
        for name, value in module.vitals.items():
            total, n = self._sums.get(name, (value * 0, 0))
            self._sums[name] = total.to(value.device) + value, n + 1
        module.vitals.clear()
        self._count_codes(module, outputs["indices"])
        super().on_train_batch_end(trainer, module)
        if module.step % self.every == 0:
            names = sorted(self._sums)
            totals = [self._sums[name] for name in names]
            # Means over all ranks, so that all ranks report the same.
            means = all_reduce_mean(torch.stack([total / n for total, n in totals])).tolist()
            self.look(trainer, module, self.examine(module, dict(zip(names, means, strict=True))))
            figures = {f"train/{name}": value for name, value in self.codebook_figures.items()}
            module.log_dict(figures)
            self._sums = {}

    def _count_codes(self, module: VQGAN, indices: Tensor | None) -> None:
        use = module.codebook_use
        if use is None or indices is None:
            return
        if self._codes is None:
            self._codes = module.tokenizer.quantizer.make_code_use().to(module.device)
            if self._counts is not None:
                self._codes.counts.copy_(self._counts)
        self._codes.update(indices)

    def examine(self, module: VQGAN, means: dict[str, float]) -> Iterator[Sign]:
        """The signs of trouble, by the means of all terms since the last examination."""
        yield from self.examine_codes(module)
        if means.get("gate") == 1.0 and "lambda" in means:
            yield from self.examine_lambda(module, means["lambda"])
        if "discriminator" in means:
            yield from self.examine_discriminator(module, means)
        if means.get("gate", 1.0) == 1.0:
            yield from self.examine_shares(means)

    def examine_codes(self, module: VQGAN) -> Iterator[Sign]:
        codes = self._codes
        if codes is not None and codes.count_least() >= TOKENS_PER_CODE * codes.K:
            self._collapse = self.find_collapse(codes, list_remedies(module))
            codes.reset()
        if self._collapse is not None:
            yield self._collapse

    def find_collapse(self, codes: CodebookUse, remedies: Sequence[str]) -> Sign | None:
        figures = {name: float(value) for name, value in codes.compute().items()}
        self.codebook_figures = figures
        least_perplexity = max(codes.K / 100, 1.5)
        if figures["usage"] >= self.least_used and figures["perplexity"] >= least_perplexity:
            return find_narrow_scale(codes, remedies)
        used, perplexity = figures["codes_used"], figures["perplexity"]
        return Sign(
            "codes",
            f"the codebook has collapsed: {used:.0f} of {codes.K} codes in use, perplexity {perplexity:.1f}",
            ", ".join([*remedies, "a smaller quantizer.K, or a lower optimizer.lr"]),
        )

    def examine_lambda(self, module: VQGAN, now: float) -> Iterator[Sign]:
        assert module.adversary is not None
        adaptive = module.adversary.adaptive
        if self._usual_lambda is None:
            self._usual_lambda = now
        usual = self._usual_lambda
        if now >= 0.99 * adaptive.scale * adaptive.max_weight:
            yield Sign(
                "lambda",
                f"lambda is at its cap ({now:.3g}): the adversarial gradient has vanished",
                "loss.gate.warmup twice as long, or loss/adaptive=constant",
            )
        elif now > self.factor * usual:
            yield Sign(
                "lambda",
                f"lambda explodes: {now:.3g}, {now / max(usual, 1e-30):.0f} times what it was when the gate opened",
                "loss.adaptive.anchor=50 or loss.adaptive.max_weight="
                + f"{max(10 * usual, 1e-3):.2g}",
            )
        elif now * self.factor < usual or now == 0 < adaptive.scale:
            yield Sign(
                "lambda",
                f"lambda vanishes: {now:.3g}, {now / max(usual, 1e-30):.1g} of what it was when the gate opened",
                "loss.r1.weight=1, a lower loss.discriminator_optimizer.lr, or loss/adaptive=constant",
            )

    def examine_discriminator(self, module: VQGAN, means: dict[str, float]) -> Iterator[Sign]:
        assert module.adversary is not None
        loss, blind = means["discriminator"], module.adversary.game.blind
        logits = f"logits {means['logits_real']:.2g} for real, {means['logits_fake']:.2g} for fake"
        if loss > 0.99 * blind:
            yield Sign(
                "discriminator",
                f"the discriminator is dead: its loss is {loss:.3g}, a blind one's {blind:.3g}; {logits}",
                "a higher loss.discriminator_optimizer.lr, or a lower loss.lecam.weight",
            )
        elif loss < 0.01 * blind:
            yield Sign(
                "discriminator",
                f"the discriminator is saturated: its loss is {loss:.3g}, a blind one's {blind:.3g}; {logits}",
                "loss.lecam.weight=0.1, loss/augment=diffaugment, or a lower loss.discriminator_optimizer.lr",
            )

    def examine_shares(self, means: dict[str, float]) -> Iterator[Sign]:
        if not any(means.get(f"share_{name}", 0.0) for name in SHARE_SETTINGS):
            return  # no term has a gradient: nothing was lost
        for name, setting in SHARE_SETTINGS.items():
            share = means.get(f"share_{name}", math.inf)
            if share < self.least_share:
                yield Sign(
                    name,
                    f"the loss term {name} is without influence: it has {share:.1g} of the gradient at the reconstruction",
                    f"a larger {setting}, or leave the term out",
                )

    def state_dict(self) -> dict[str, Any]:
        sums = {name: (total.cpu(), n) for name, (total, n) in self._sums.items()}
        counts = self._counts if self._codes is None else self._codes.counts.clone().cpu()
        collapse = self._collapse
        return super().state_dict() | {
            "since": all_gather((sums, counts)),  # one entry per rank
            "counted": self.codebook_figures,
            "collapse": collapse and (collapse.name, collapse.observation, collapse.remedy),
            "usual": self._usual_lambda,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "since" in state_dict:  # checkpoints of earlier versions have none of these
            self._sums, self._counts = own_entry(state_dict["since"], ({}, None))
            self.codebook_figures = state_dict["counted"]
            self._collapse = Sign(*state_dict["collapse"]) if state_dict["collapse"] else None
            self._usual_lambda = state_dict["usual"]


def list_remedies(module: VQGAN) -> list[str]:
    """What can help against a collapse, by the settings that this run's quantizer has."""
    quantizer = module.tokenizer.quantizer
    path = "quantizer"
    if isinstance(quantizer, MultiCodebook | MultiScaleResidual):
        quantizer, path = quantizer.inner_quantizers[0], "quantizer.inner"
    remedies = [] if module.code_cost is None else ["a lower loss.code_cost"]
    if hasattr(quantizer, "kmeans"):
        revives = (
            f" {path}.revive=0.5" if quantizer.grows else ""
        )  # what can't grow sets no single codes
        remedies.append(f"{path}.kmeans=true{revives}")
    return remedies


def find_narrow_scale(codes: CodebookUse, remedies: Sequence[str] = ()) -> Sign | None:
    """The sign that one scale of several makes use of hardly more than one code."""
    if not codes.lengths:
        return None
    for number, (perplexity, count) in enumerate(codes.count_perplexities()):
        if count >= ENOUGH_OF_SCALE and perplexity < LEAST_OF_SCALE:
            return Sign(
                "codes",
                f"scale {number + 1} of {len(codes.lengths)} has collapsed: the perplexity of its codes is {perplexity:.1f}",
                ", or ".join([*remedies, "quantizer.scales without it"]),
            )
    return None
