"""What the discriminator and the generator want of the logits, and when and how much it counts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from vqgan.clock import Mark, Now
from vqgan.quantizers.base import all_reduce


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean relu(1 - D(x)) + relu(1 + D(x_hat)), halved (Lim & Ye 2017; Tran et al. 2017): 1 for a blind discriminator."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean D(x_hat)."""
    return -fake.float().mean()


class Gate:
    """When the discriminator trains and how much of its gradient the generator gets.

    `start` is the moment its gradient first reaches the generator: a step (int) or a fraction of the run (float).
    The weight rises from 0 to 1 over `ramp`; the discriminator trains alone for `warmup` before `start`, so that it has
    an opinion when it is asked for one. All three are steps or all three are fractions.
    """

    def __init__(self, start: Mark = 0.3, ramp: Mark = 0.1, warmup: Mark = 0.05) -> None:
        kinds = {type(mark) for mark in (start, ramp, warmup) if mark}
        if not kinds <= {int, float} or len(kinds) > 1:
            raise InputError(
                f"gate start={start}, ramp={ramp}, warmup={warmup} must be all steps (whole) or all fractions (with a point)"
            )
        if min(start, ramp, warmup) < 0 or (kinds == {float} and max(start, ramp, warmup) > 1):
            raise InputError(f"gate start={start}, ramp={ramp}, warmup={warmup}: steps are at least 0, fractions 0 to 1")
        self.start, self.ramp, self.warmup = start, ramp, warmup
        self._in_steps = kinds == {int}

    def _clock(self, now: Now) -> float:
        return now.step if self._in_steps else now.progress

    def training(self, now: Now) -> bool:
        """Whether the discriminator trains."""
        return self._clock(now) >= self.start - self.warmup

    def open(self, now: Now) -> bool:
        """Whether its gradient reaches the generator."""
        return self._clock(now) >= self.start

    def phase(self, now: Now) -> float:
        """Progress, 0 to 1, within the part of the run before the opening or after it."""
        if not self.open(now):
            return self._clock(now) / self.start
        opened = now.progress * self.start / now.step if self._in_steps and now.step else self.start
        return (now.progress - opened) / (1 - opened) if opened < 1 else 1.0

    def weight(self, now: Now) -> float:
        """The share, 0 to 1, of the discriminator's gradient that reaches the generator."""
        since = self._clock(now) - self.start
        if since < 0:
            return 0.0
        return min(1.0, since / self.ramp) if self.ramp else 1.0


class AdaptiveWeight(nn.Module):
    """lambda = scale * |grad of rec| / (|grad of adv| + delta) at the decoder's last layer (Esser et al. 2021, VQGAN eq. 7).

    Capped at `most`, float32 and detached. The paper has delta = 1e-6, the authors' code 1e-4.

    The paper's ratio of the moment makes both gradients equally long, whatever the reconstruction has become: the worse
    it is, the longer its gradient and with it lambda, and from scale 1 on nothing holds it. With `anchor` above 0,
    |grad of rec| is its mean over the first `anchor` updates, and |grad of adv| a running mean, which may fall to
    1/`growth` of what it was by then: the discriminator's pull stays in proportion to what the reconstruction's was when
    the gate opened, and a discriminator that no longer tells anything apart gets no unbounded weight.
    """

    rec: Tensor
    adv: Tensor
    least: Tensor
    calls: Tensor

    def __init__(self, scale: float = 0.8, most: float = 1e4, delta: float = 1e-6, anchor: int = 0, growth: float = 10.0) -> None:
        super().__init__()
        if scale < 0 or anchor < 0 or growth < 1:
            raise InputError(f"loss.adaptive: scale={scale} and anchor={anchor} must be at least 0, growth={growth} at least 1")
        self.scale, self.most, self.delta, self.anchor, self.growth = scale, most, delta, anchor, growth
        for name in ("rec", "adv", "least"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter) -> dict[str, Tensor]:
        """Two scalar losses -> lambda and both gradient norms, scalars."""
        with torch.autocast(last.device.type, enabled=False):
            rec = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].float().norm()
            adv = torch.autograd.grad(adversarial, last, retain_graph=True)[0].float().norm()
            ratio = self.anchored(rec, adv) if self.anchor else rec / (adv + self.delta)
        weight = self.scale * ratio.clamp(max=self.most)
        return {"lambda": weight.detach(), "grad_rec": rec.detach(), "grad_adv": adv.detach()}

    @torch.no_grad()
    def anchored(self, rec: Tensor, adv: Tensor) -> Tensor:
        """The ratio of the remembered gradients, after these two are remembered too."""
        early = self.calls < self.anchor
        self.calls += 1
        self.rec.copy_(torch.where(early, self.rec + (rec - self.rec) / self.calls, self.rec))
        self.adv.copy_(self.adv + (adv - self.adv) / self.calls.clamp(max=50))
        self.least.copy_(torch.where(early, self.adv / self.growth, self.least))
        return self.rec / (torch.maximum(self.adv, self.least) + self.delta)


class LeCam(nn.Module):
    """Keeps a discriminator from being too sure when data or time is short (Tseng et al. 2021, eq. 3).

    weight * (mean relu(D(x) - f)^2 + mean relu(r - D(x_hat))^2), r and f the running means of the logits of real images
    and of reconstructions; with relu as in the authors' code. Both means are buffers: they survive a resume.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, weight: float = 0.1, decay: float = 0.99) -> None:
        super().__init__()
        self.weight, self.decay = weight, decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The logits of both, any shape -> a scalar; remembers their means."""
        real, fake = real.float(), fake.float()
        penalty = F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()
        with torch.no_grad():
            self.real.lerp_(mean_of_ranks(real), 1 - self.decay)
            self.fake.lerp_(mean_of_ranks(fake), 1 - self.decay)
        return self.weight * penalty


def mean_of_ranks(x: Tensor) -> Tensor:
    """The mean of x over all its elements and all ranks."""
    total = all_reduce(torch.stack([x.detach().sum(), x.new_tensor(float(x.numel()))]))
    return total[0] / total[1]
