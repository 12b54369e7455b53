"""How much each loss of the reconstruction counts: gradients at x_hat, their shares, and lambda."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vqgan.losses.weight import AdaptiveWeight

ADVERSARIAL = "adversarial"  # the term whose weight lambda multiplies


class Term(NamedTuple):
    """A loss of the reconstruction, a scalar, and its weight in the sum."""

    weight: float
    loss: Tensor


class Balancer:
    """Turns the losses of a reconstruction into one gradient at x_hat (VQGAN, Esser et al. 2021, eq. 6 and 7).

    Each loss goes backward once, and only as far as x_hat. lambda and each loss's share of the influence can be read off
    the gradients there, so only their weighted sum has to go backward through the decoder. The one thing that a call
    changes is what the adaptive weight measures.
    """

    def __init__(self, adaptive: AdaptiveWeight | None = None) -> None:
        self.adaptive = adaptive

    def balance(
        self,
        terms: Mapping[str, Term],
        leaf: Tensor,
        x_hat: Tensor,
        last: Tensor,
        share: float = 1.0,
        loss_scale: Tensor | float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient at x_hat of all losses together, and share_<name> of each loss for the log.

        `terms` are losses of `leaf` (B, C, H, W), which has the values of x_hat but not its graph. `last` are the weights
        of the decoder's last layer, at which lambda compares the adversarial loss with all others. `share` is that of this
        micro-batch in the update; `loss_scale` keeps the gradients within float16 on their way.
        """
        slopes = {
            name: torch.autograd.grad(loss_scale * term.loss, leaf, retain_graph=True)[0]
            / loss_scale
            for name, term in terms.items()
        }
        pulls = {name: self._weight(name, term) * slopes[name] for name, term in terms.items()}
        if self.adaptive is not None and ADVERSARIAL in terms:
            others = sum_of(pull for name, pull in pulls.items() if name != ADVERSARIAL)
            rec, adv = (
                torch.autograd.grad(x_hat, last, loss_scale * slope, retain_graph=True)[0].float()
                / loss_scale
                for slope in (others, slopes[ADVERSARIAL])
            )
            self.adaptive.measure(rec, adv, share)
        norms = {name: pull.norm() for name, pull in pulls.items()}
        total = sum_of(norms.values()) + torch.finfo(torch.float32).tiny
        return sum_of(pulls.values()), {f"share_{name}": n / total for name, n in norms.items()}

    def update(self) -> dict[str, Tensor]:
        """Compute lambda for the next update from the gradients of this one; lambda, grad_rec and grad_adv for the log."""
        assert self.adaptive is not None, "no loss is weighed against another"
        return self.adaptive.update()

    def _weight(self, name: str, term: Term) -> float | Tensor:
        if self.adaptive is None or name != ADVERSARIAL:
            return term.weight
        return term.weight * self.adaptive.weight


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(tensors)).sum(0)
