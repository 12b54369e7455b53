"""What keeps a discriminator from being too sure."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import all_reduce_mean
from engine.errors import check_int, check_range
from vqgan.discriminators.patch import Judgement


class LeCam(nn.Module):
    """For when data or time is short (Tseng et al. 2021, eq. 3); a weight of 0 leaves it out.

    weight * (mean relu(D(x) - f)^2 + mean relu(r - D(x_hat))^2), r and f the running means of the logits of real images
    and of reconstructions; with relu as in the authors' code. Both means are buffers: they survive a resume.
    """

    means: Tensor

    def __init__(self, weight: float = 0.1, decay: float = 0.99) -> None:
        super().__init__()
        check_range("loss.lecam.weight", weight, 0)
        check_range("loss.lecam.decay", decay, 0, 1)
        self.weight, self.decay = weight, decay
        self.register_buffer("means", torch.zeros(2))
        self._seen: Tensor | None = None

    def forward(self, real: Tensor, fake: Tensor, share: float = 1.0) -> Tensor:
        """The logits of both, any shape, of a micro-batch that is this share of the update -> a scalar."""
        real, fake = real.float(), fake.float()
        seen = share * torch.stack([real.detach().mean(), fake.detach().mean()])
        self._seen = seen if self._seen is None else self._seen + seen
        return self.weight * (
            F.relu(real - self.means[1]).square().mean()
            + F.relu(self.means[0] - fake).square().mean()
        )

    @torch.no_grad()
    def update(self) -> None:
        """Remember the logits of this update, of all micro-batches and ranks."""
        assert self._seen is not None
        self.means.lerp_(all_reduce_mean(self._seen), 1 - self.decay)
        self._seen = None


class R1(nn.Module):
    """weight / 2 * mean |gradient of D at the real images|^2 (Mescheder et al. 2018, eq. 9); a weight of 0 leaves it out.

    D is an image's mean logit. Computed every `every` updates and multiplied by that (Karras et al. 2020, section 3.1), in
    float32: the gradient of a gradient has no room in 16 bits.
    """

    def __init__(self, weight: float = 0.0, every: int = 16) -> None:
        super().__init__()
        check_range("loss.r1.weight", weight, 0)
        check_int("loss.r1.every", every, 1, "updates")
        self.weight, self.every = weight, every

    def due(self, update: int) -> bool:
        """Whether this update of the discriminator pays the penalty."""
        return bool(self.weight) and update % self.every == 0

    def forward(self, discriminator: nn.Module, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> a scalar."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().float().requires_grad_()
            judged: Judgement = discriminator(x)
            [slope] = torch.autograd.grad(
                judged.logits.flatten(1).mean(1).sum(), x, create_graph=True
            )
        return self.weight / 2 * self.every * slope.square().flatten(1).sum(1).mean()
