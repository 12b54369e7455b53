"""Penalties that keep a discriminator from being too confident."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.collectives import all_reduce_mean
from codegrid.engine.errors import check_int, check_range
from codegrid.engine.precision import without_autocast
from vqgan.discriminators.base import Judgement


class LeCam(nn.Module):
    """Regularisation for little data or short runs (Tseng et al. 2021, eq. 3); a weight of 0 turns it off.

    weight * (mean relu(D(x) - f)^2 + mean relu(r - D(x_hat))^2), where r and f are running means of the logits of real
    images and of reconstructions, and relu is as in the authors' code. Both means are buffers and survive a resume.
    """

    means: Tensor

    def __init__(self, weight: float, decay: float) -> None:
        super().__init__()
        check_range("loss.lecam.weight", weight, 0)
        check_range("loss.lecam.decay", decay, 0, 1)
        self.weight, self.decay = weight, decay
        self.register_buffer("means", torch.zeros(2))
        self._batch_means: Tensor | None = None  # of this update so far

    def forward(self, real: Tensor, fake: Tensor, share: float = 1.0) -> Tensor:
        """The logits of both, any shape, of a micro-batch that is this share of the update -> a scalar."""
        real, fake = real.float(), fake.float()
        means = share * torch.stack([real.detach().mean(), fake.detach().mean()])
        self._batch_means = means if self._batch_means is None else self._batch_means + means
        return self.weight * (
            F.relu(real - self.means[1]).square().mean()
            + F.relu(self.means[0] - fake).square().mean()
        )

    @torch.no_grad()
    def update(self) -> None:
        """Move the running means towards the logits of this update, of all micro-batches and ranks."""
        assert self._batch_means is not None
        self.means.lerp_(all_reduce_mean(self._batch_means), 1 - self.decay)
        self._batch_means = None


class R1(nn.Module):
    """weight / 2 * mean |gradient of D at the real images|^2 (Mescheder et al. 2018, eq. 9); a weight of 0 turns it off.

    D is the mean logit of an image. It is computed every `every` updates and multiplied by that number (Karras et al.
    2020, section 3.1), in float32, because 16 bits are too few for the gradient of a gradient.
    """

    def __init__(self, weight: float, every: int) -> None:
        super().__init__()
        check_range("loss.r1.weight", weight, 0)
        check_int("loss.r1.every", every, 1, "updates")
        self.weight, self.every = weight, every

    def due(self, update: int) -> bool:
        """Whether this update of the discriminator includes the penalty."""
        return bool(self.weight) and update % self.every == 0

    def forward(self, discriminator: nn.Module, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> a scalar."""
        with without_autocast(x.device):
            x = x.detach().float().requires_grad_()
            judgement: Judgement = discriminator(x)
            score = judgement.logits.flatten(1).mean(1).sum()
            [slope] = torch.autograd.grad(score, x, create_graph=True)
        return self.weight / 2 * self.every * slope.square().flatten(1).sum(1).mean()
