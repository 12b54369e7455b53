"""An alarm for runs of stage 1 that go wrong without saying so."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from engine.callbacks.alarms import Alarms, Sign
from engine.distributed import all_gather, all_reduce_mean, own_entry
from engine.errors import check_range
from evaluation.codebook import CodebookUse
from vqgan.module import VQGAN


class TokenizerDoctor(Alarms):
    """Looks at a run of stage 1 every `every` updates.

    * the codebook has collapsed: under `least_used` of its K codes are in use, or its perplexity is under 1% of K
    * lambda is at its cap, or `factor` times more or less than when the gate was first fully open
    * the discriminator is dead, its loss within 1% of a blind one's, or saturated, its loss under 1% of that
    * a loss term has under `least_share` of the gradient at the reconstruction

    What is looked at are means over the updates since the last look; all of it is in the logs. The codes are counted over as
    many updates as it takes to see each one ten times, were all alike; train/perplexity and its like are of the last count.
    """

    def __init__(
        self,
        every: int = 50,
        patience: int = 3,
        least_used: float = 0.1,
        factor: float = 100.0,
        least_share: float = 1e-4,
    ) -> None:
        super().__init__(every, patience)
        check_range("callbacks.doctor.least_used", least_used, 0, 1)
        check_range("callbacks.doctor.factor", factor, 1)
        check_range("callbacks.doctor.least_share", least_share, 0, 1)
        self.least_used, self.factor, self.least_share = least_used, factor, least_share
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._codes: CodebookUse | None = None
        self._counts: Tensor | None = None  # those of the codes when a checkpoint was made
        self.counted: dict[str, float] = {}  # the figures of the last count of the codes
        self._collapse: Sign | None = None  # what the last count of the codes said
        self._usual: float | None = None  # lambda when the gate was first fully open

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        assert isinstance(module, VQGAN)
        for name, value in module.vitals.items():
            total, n = self._sums.get(name, (value * 0, 0))
            self._sums[name] = total.to(value.device) + value, n + 1
        module.vitals.clear()
        if module.use is not None and outputs["indices"] is not None:
            if self._codes is None:
                self._codes = CodebookUse(module.use.K, module.use.num_codebooks).to(module.device)
                if self._counts is not None:
                    self._codes.counts.copy_(self._counts)
            self._codes.update(outputs["indices"])
        super().on_train_batch_end(trainer, module)
        if module.step % self.every == 0:
            names = sorted(self._sums)  # of all ranks, that all of them say the same
            found = all_reduce_mean(
                torch.stack([total / n for total, n in map(self._sums.__getitem__, names)])
            )
            means = dict(zip(names, found.tolist(), strict=True))
            self.look(trainer, module, self.signs(module, means))
            module.log_dict({f"train/{name}": value for name, value in self.counted.items()})
            self._sums = {}

    def signs(self, module: VQGAN, means: dict[str, float]) -> Iterator[Sign]:
        """What is wrong, by the means of all terms since the last look."""
        yield from self.of_codes()
        if means.get("gate") == 1.0 and "lambda" in means:
            yield from self.of_lambda(module, means["lambda"])
        if "discriminator" in means:
            yield from self.of_discriminator(module, means)
        if means.get("gate", 1.0) == 1.0:
            yield from self.of_influence(module, means)

    def of_codes(self) -> Iterator[Sign]:
        if (
            self._codes is not None
            and self._codes.counts.sum() >= 10 * self._codes.K * self._codes.num_codebooks
        ):
            self._collapse = self.collapse(
                self._codes
            )  # of fewer tokens, a rare code looks unused: count on till then
            self._codes.reset()
        if self._collapse is not None:
            yield self._collapse

    def collapse(self, codes: CodebookUse) -> Sign | None:
        self.counted = found = {name: float(value) for name, value in codes.compute().items()}
        if found["usage"] >= self.least_used and found["perplexity"] >= max(codes.K / 100, 1.5):
            return None
        used = f"{found['codes_used']:.0f} of {codes.K} codes in use, perplexity {found['perplexity']:.1f}"
        return Sign(
            "codes",
            f"the codebook has collapsed: {used}",
            "quantizer.kmeans=true quantizer.revive=0.5, a smaller quantizer.K, or a lower optimizer.lr",
        )

    def of_lambda(self, module: VQGAN, now: float) -> Iterator[Sign]:
        assert module.adaptive is not None
        self._usual = usual = now if self._usual is None else self._usual
        if now >= 0.99 * module.adaptive.scale * module.adaptive.max_weight:
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
        elif now * self.factor < usual or now == 0 < module.adaptive.scale:
            yield Sign(
                "lambda",
                f"lambda vanishes: {now:.3g}, {now / max(usual, 1e-30):.1g} of what it was when the gate opened",
                "loss.r1.weight=1, a lower loss.discriminator_optimizer.lr, or loss/adaptive=constant",
            )

    def of_discriminator(self, module: VQGAN, means: dict[str, float]) -> Iterator[Sign]:
        loss, blind = means["discriminator"], module.adversarial.blind
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

    def of_influence(self, module: VQGAN, means: dict[str, float]) -> Iterator[Sign]:
        weights = {
            "rec": "loss.pixel.l2",
            "perceptual": "loss.perceptual_weight",
            "adversarial": "loss.adaptive.scale",
        }
        for name, setting in weights.items():
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
        return super().state_dict() | {
            "since": all_gather((sums, counts)),  # the last look: each rank has its own
            "counted": self.counted,
            "collapse": self._collapse
            and (self._collapse.name, self._collapse.observation, self._collapse.remedy),
            "usual": self._usual,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "since" in state_dict:  # a checkpoint of an earlier version has none of these
            self._sums, self._counts = own_entry(state_dict["since"], ({}, None))
            self.counted = state_dict["counted"]
            self._collapse = Sign(*state_dict["collapse"]) if state_dict["collapse"] else None
            self._usual = state_dict["usual"]
