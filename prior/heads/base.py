"""What every head does."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.decoding.sampling import Sampler


@dataclass
class Judged:
    """How targets (...) fare: their nats, -log p; how many codes are likelier than they; and how many are as likely, themselves
    included."""

    nats: Tensor
    above: Tensor
    tied: Tensor


class Head(ABC):
    """p(code | x) over K codes, where x (..., width) is what the network computed at a position.

    x and the targets (...) may have any number of dimensions. Nats are float32 and exact, however many codes there are.
    """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """x (..., width) -> logits (..., K) float32, whose softmax is p."""

    @abstractmethod
    def nats(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """-log p of the targets (...); a share `smoothing` of the target is spread evenly (Szegedy et al. 2016, section 7)."""

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """What training minimises at each target (...), and the target's nats, without gradients."""
        if not smoothing:
            nats = self.nats(x, targets)
            return nats, nats.detach()
        with torch.no_grad():
            nats = self.nats(x, targets)
        return self.nats(x, targets, smoothing), nats

    @torch.no_grad()
    def judge(self, x: Tensor, targets: Tensor) -> Judged:
        """What a validation asks of the targets (...)."""
        return judge_logits(self.logits(x), targets)

    def draws_directly(self, sampler: Sampler) -> bool:
        """Whether `draw` draws as the sampler says, without the logits of all codes."""
        return False

    def draw(self, x: Tensor, uniform: Tensor) -> Tensor:
        """x (n, width) and numbers (n,) uniform in [0, 1) -> codes (n,) distributed as p."""
        return Sampler.unmodified().draw(self.logits(x), uniform)

    def draw_from_logits(self, logits: Tensor, uniform: Tensor, sampler: Sampler) -> Tensor:
        """Logits (n, K), which may be guided, and numbers (n,) uniform in [0, 1) -> codes (n,) as the sampler draws them."""
        return sampler.draw(logits, uniform)


class Logits(Head):
    """The head of a prior that computes logits itself: x is (..., K)."""

    def logits(self, x: Tensor) -> Tensor:
        return x

    def nats(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = x.flatten(0, -2).float()
        nats = F.cross_entropy(
            logits, targets.flatten(), reduction="none", label_smoothing=smoothing
        )
        return nats.view_as(targets)


LOGITS = Logits()


def judge_logits(logits: Tensor, targets: Tensor) -> Judged:
    """How the targets (...) fare with these logits (..., K)."""
    target = logits.gather(-1, targets[..., None])
    above = (logits > target).sum(-1)
    tied = (logits == target).sum(-1)
    return Judged(LOGITS.nats(logits, targets), above, tied)
