"""How much the adversarial loss counts beside the reconstruction: lambda."""

import torch
from torch import Tensor, nn

from engine.distributed import all_reduce_mean
from engine.errors import InputError


class AdaptiveWeight(nn.Module):
    """lambda = scale * |grad of rec| / (|grad of adv| + delta) at the decoder's last layer (Esser et al. 2021, VQGAN eq. 7).

    Float32, detached, capped at `max_weight`. Both gradients are those of a whole update: the mean over its micro-batches and
    over all ranks. So lambda is known after the update only and serves the next one; the first one after the gate opens
    has none yet and counts the adversarial loss with 0. The paper has delta = 1e-6, the authors' code 1e-4.

    Both lengths are running means over about `smooth` updates; 1 is the ratio of the last update alone. It makes both
    gradients equally long, whatever the reconstruction has become: the worse it is, the longer its gradient and with it
    lambda, and from scale 1 on nothing holds it. With `anchor` above 0, |grad of rec| stays as it was after that many
    updates, and |grad of adv| may fall to 1/`growth` of what it was by then: the discriminator's pull stays in proportion
    to what the reconstruction's was when the gate opened, and a discriminator that no longer tells anything apart gets no
    unbounded weight.
    """

    rec: Tensor
    adv: Tensor
    least: Tensor
    calls: Tensor
    weight: Tensor

    def __init__(
        self,
        scale: float = 0.8,
        max_weight: float = 1e4,
        delta: float = 1e-6,
        smooth: int = 1,
        anchor: int = 0,
        growth: float = 10.0,
    ) -> None:
        super().__init__()
        if scale < 0 or anchor < 0 or smooth < 1 or growth < 1:
            raise InputError(
                f"loss.adaptive: scale={scale} and anchor={anchor} must be at least 0, "
                f"smooth={smooth} and growth={growth} at least 1"
            )
        self.scale, self.max_weight, self.delta = scale, max_weight, delta
        self.smooth, self.anchor, self.growth = smooth, anchor, growth
        for name in ("rec", "adv", "least", "weight"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self._sums: tuple[Tensor, Tensor] | None = None

    def measure(self, rec: Tensor, adv: Tensor, share: float = 1.0) -> None:
        """The gradients of a micro-batch, any shape, which is this share of the update."""
        before = self._sums or (torch.zeros_like(rec), torch.zeros_like(adv))
        self._sums = (before[0] + share * rec, before[1] + share * adv)

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """lambda for the next update, from what was measured since the last; and both norms, for the log."""
        assert self._sums is not None
        rec, adv = (all_reduce_mean(gradient).norm() for gradient in self._sums)
        self._sums = None
        sound = (
            rec.isfinite() & adv.isfinite()
        )  # under float16 an update may overflow, and is then left out
        early = sound & ((self.calls < self.anchor) if self.anchor else torch.ones_like(sound))
        self.calls += sound
        memory = self.calls.clamp(min=1, max=self.smooth)
        self.rec.copy_(torch.where(early, self.rec + (rec - self.rec) / memory, self.rec))
        self.adv.copy_(torch.where(sound, self.adv + (adv - self.adv) / memory, self.adv))
        if self.anchor:
            self.least.copy_(torch.where(early, self.adv / self.growth, self.least))
        self.weight.copy_(self.ratio())
        return {"lambda": self.weight.clone(), "grad_rec": rec, "grad_adv": adv}

    def ratio(self) -> Tensor:
        """lambda, by what is remembered."""
        return self.scale * (self.rec / (torch.maximum(self.adv, self.least) + self.delta)).clamp(
            max=self.max_weight
        )


class ConstantWeight(AdaptiveWeight):
    """lambda = scale, whatever the gradients; they are measured for the log alone."""

    def __init__(self, scale: float = 0.1) -> None:
        super().__init__(scale)
        self.weight.fill_(scale)

    def ratio(self) -> Tensor:
        return torch.full_like(self.weight, self.scale)
