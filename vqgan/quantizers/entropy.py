"""Entropy regularisation: be sure of each code, and use all of them alike (Yu et al. 2023, MAGVIT-v2, eq. 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import check_range
from vqgan.quantizers.base import Anneal


class Entropy(nn.Module):
    """weight * (mean_n H(p_n) - diversity * H(mean_n p_n)) in nats, p_n the soft assignment of one encoder output.

    p_n is softmax(-d^2 / temperature) over the codes, d^2 the squared distances. The first term makes assignments sharp,
    the second spreads them over the codebook. The weight goes from `first`, where that is
    given, to `weight` over so many `updates`.
    """

    def __init__(
        self,
        weight: float = 0.0,
        first: float | None = None,
        updates: int = 2000,
        temperature: float = 1.0,
        diversity: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("weight", weight),
            ("first", first or 0),
            ("updates", updates),
            ("diversity", diversity),
        ):
            check_range(f"quantizer.entropy.{name}", value, 0)
        check_range("quantizer.entropy.temperature", temperature, 1e-6)
        self.weight = Anneal(weight if first is None else first, weight, updates)
        self.temperature, self.diversity = temperature, diversity

    def at(self, update: Tensor) -> float:
        """The weight after so many updates."""
        constant = self.weight.first == self.weight.last
        return (
            self.weight.last if constant else self.weight(int(update))
        )  # int() waits for the device

    def of_distances(self, squared: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances (n, K) -> mean_n H(p_n) and H(mean_n p_n)."""
        logits = -squared / self.temperature
        log_p = F.log_softmax(logits, 1)
        p = log_p.exp()
        return -(p * log_p).sum(1).mean(), entropy(p.mean(0))

    def of_bits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, bits), at temperature 1, of independent bits being 1 -> the same two for the 2^bits codes, exactly.

        H(p_n) is the sum over the bits. mean_n p_n of the code (a, b), a the first half of the bits and b the second, is
        mean_n p_n(a) p_n(b): one matrix product, and no n x K matrix for any K.
        """
        sure = (
            F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
            .sum(1)
            .mean()
        )
        half = logits.shape[1] // 2
        first, second = words(logits[:, :half]), words(logits[:, half:])
        return sure, entropy((first.t() @ second).flatten() / len(logits))

    def loss(self, sure: Tensor, spread: Tensor, update: Tensor) -> Tensor:
        """The weighted difference of the two."""
        return self.at(update) * (sure - self.diversity * spread)


def entropy(p: Tensor) -> Tensor:
    """-sum p log p in nats of probabilities of any shape."""
    return -torch.xlogy(p, p.clamp(min=1e-30)).sum()


def words(logits: Tensor) -> Tensor:
    """Logits (n, bits) of independent bits -> probabilities (n, 2^bits) of their words, the first bit the highest."""
    p = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        one = bit.sigmoid()[:, None]
        p = torch.stack([p * (1 - one), p * one], 2).flatten(1)
    return p
