"""The game between generator and discriminator: what each of them minimises, as a function of the logits.

Logits are larger for real images. They have any shape, and losses are computed in float32.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class Game(ABC):
    """Two losses of logits, one for each player; both are means over all logits."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """The logits of images and of reconstructions -> what the discriminator minimises, a scalar."""

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """The logits of reconstructions -> what the generator minimises, a scalar."""

    @property
    def blind(self) -> float:
        """The loss of a discriminator that tells nothing apart: logits of 0 everywhere."""
        return float(self.discriminator(torch.zeros(1), torch.zeros(1)))


class Hinge(Game):
    """max(0, 1 - D(x)) + max(0, 1 + D(x_hat)), halved, against -D(x_hat) (Lim & Ye 2017, eq. 5; Tran et al. 2017)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.float().mean()


class NonSaturating(Game):
    """-log D(x) - log(1 - D(x_hat)), halved, against -log D(x_hat), D = sigmoid of the logit (Goodfellow et al. 2014).

    softplus(-logit) is -log sigmoid(logit), which needs no target tensor that could be confused with the logits.
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()) / 2

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake.float()).mean()


class Vanilla(NonSaturating):
    """The same discriminator against log(1 - D(x_hat)): the minimax game (Goodfellow et al. 2014, eq. 1).

    The generator's gradient is smallest where it is worst, which the adaptive weight compensates.
    """

    def generator(self, fake: Tensor) -> Tensor:
        return -F.softplus(fake.float()).mean()


class LeastSquares(Game):
    """(D(x) - 1)^2 + (D(x_hat) + 1)^2, halved, against D(x_hat)^2 (Mao et al. 2017, eq. 8: a = -1, b = 1, c = 0)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return ((real.float() - 1).square().mean() + (fake.float() + 1).square().mean()) / 2

    def generator(self, fake: Tensor) -> Tensor:
        return fake.float().square().mean()
