"""The weight of the adversarial loss against the reconstruction: lambda."""

import torch
from torch import Tensor, nn

from codegrid.engine.collectives import all_reduce_mean
from codegrid.engine.errors import InputError


class AdaptiveWeight(nn.Module):
    """lambda = scale * |grad of rec| / (|grad of adv| + delta) at the decoder's last layer (Esser et al. 2021, VQGAN eq. 7).

    Float32, detached, capped at `max_weight`. Both gradients are means over the micro-batches and ranks of a whole update,
    so lambda is known only after the update and is used in the next one. In the first update after the gate opens it is
    still 0. The paper has delta = 1e-6, the authors' code 1e-4.

    Both norms are running means over about `smooth` updates; 1 means the last update alone. The ratio makes both gradients
    equally long at any quality of the reconstruction: the worse it gets, the longer its gradient and the larger lambda, so
    from scale 1 on nothing holds the reconstruction. An `anchor` above 0 freezes |grad of rec| after that many updates and
    lets |grad of adv| fall to no less than 1/`growth` of what it was by then. The adversarial pull then stays in proportion
    to that of the reconstruction when the gate opened, and the weight of a discriminator that has stopped telling anything
    apart stays bounded.
    """

    rec: Tensor
    adv: Tensor
    least: Tensor
    calls: Tensor
    weight: Tensor

    def __init__(
        self,
        scale: float,
        max_weight: float,
        delta: float,
        smooth: int,
        anchor: int,
        growth: float,
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
        self._sums: tuple[Tensor, Tensor] | None = None  # of this update's gradients so far

    def measure(self, rec: Tensor, adv: Tensor, share: float = 1.0) -> None:
        """Take in both gradients, any shape, of a micro-batch that is this share of the update."""
        before = self._sums or (torch.zeros_like(rec), torch.zeros_like(adv))
        self._sums = (before[0] + share * rec, before[1] + share * adv)

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """Compute lambda for the next update from what was measured in this one; lambda and both norms, for the log."""
        assert self._sums is not None
        rec, adv = (all_reduce_mean(gradient).norm() for gradient in self._sums)
        self._sums = None
        # Under float16 an update may overflow; the optimizer skips it, and so does lambda.
        is_finite = rec.isfinite() & adv.isfinite()
        is_early = self.calls < self.anchor if self.anchor else torch.ones_like(is_finite)
        moves_rec = is_finite & is_early
        self.calls += is_finite
        memory = self.calls.clamp(min=1, max=self.smooth)
        self.rec.copy_(torch.where(moves_rec, self.rec + (rec - self.rec) / memory, self.rec))
        self.adv.copy_(torch.where(is_finite, self.adv + (adv - self.adv) / memory, self.adv))
        if self.anchor:
            self.least.copy_(torch.where(moves_rec, self.adv / self.growth, self.least))
        self.weight.copy_(self.ratio())
        return {"lambda": self.weight.clone(), "grad_rec": rec, "grad_adv": adv}

    def ratio(self) -> Tensor:
        """lambda by the running means."""
        return self.scale * (self.rec / (torch.maximum(self.adv, self.least) + self.delta)).clamp(
            max=self.max_weight
        )


class ConstantWeight(AdaptiveWeight):
    """lambda = scale at any gradients; they are measured for the log alone."""

    def __init__(self, scale: float) -> None:
        super().__init__(scale, max_weight=1e4, delta=1e-6, smooth=1, anchor=0, growth=10.0)
        self.weight.fill_(scale)

    def ratio(self) -> Tensor:
        return torch.full_like(self.weight, self.scale)
