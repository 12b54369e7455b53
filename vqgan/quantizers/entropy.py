"""Entropy regularisation: confident assignments, and even use of all codes (Yu et al. 2023, MAGVIT-v2, eq. 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import check_range
from vqgan.quantizers.anneal import Anneal


class Entropy(nn.Module):
    """weight * (mean_n H(p_n) - diversity * H(mean_n p_n)) in nats, p_n the soft assignment of encoder output n.

    p_n is softmax(-d^2 / temperature) over the codes, with squared distances d^2. The first term makes assignments
    sharp, the second spreads them over the codebook. The weight anneals from `first` to `weight` over `updates`
    updates; it is constant if `first` is None.
    """

    def __init__(
        self,
        weight: float,
        first: float | None,
        updates: int,
        temperature: float,
        diversity: float,
    ) -> None:
        super().__init__()
        check_range("quantizer.entropy.weight", weight, 0)
        check_range("quantizer.entropy.first", first or 0, 0)
        check_range("quantizer.entropy.updates", updates, 0)
        check_range("quantizer.entropy.diversity", diversity, 0)
        check_range("quantizer.entropy.temperature", temperature, 1e-6)
        self.weight = Anneal(weight if first is None else first, weight, updates)
        self.temperature = temperature
        self.diversity = diversity

    def weight_at(self, updates: int) -> float:
        """The weight after so many updates."""
        return self.weight(updates)

    def from_distances(self, squared: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances (n, K) -> mean_n H(p_n) and H(mean_n p_n)."""
        log_p = F.log_softmax(-squared / self.temperature, 1)
        p = log_p.exp()
        return -(p * log_p).sum(1).mean(), entropy(p.mean(0))

    def from_bits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, bits) of independent bits being 1 -> mean_n H(p_n) and H(mean_n p_n) over the 2^bits codes, exactly.

        The logits already include the temperature. H(p_n) is the sum over the bits. With a code split into its first
        half of bits a and its second half b, mean_n p_n(a, b) = mean_n p_n(a) p_n(b): one matrix product, so no n x K
        matrix is needed.
        """
        of_bits = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
        half = logits.shape[1] // 2
        p_first = joint_probabilities(logits[:, :half])
        p_second = joint_probabilities(logits[:, half:])
        p = (p_first.t() @ p_second).flatten() / len(logits)
        return of_bits.sum(1).mean(), entropy(p)

    def loss(self, per_sample: Tensor, of_codebook: Tensor, updates: int) -> Tensor:
        """The weighted difference of the two entropies."""
        return self.weight_at(updates) * (per_sample - self.diversity * of_codebook)


def entropy(p: Tensor) -> Tensor:
    """-sum p log p in nats, for probabilities of any shape."""
    return -torch.xlogy(p, p.clamp(min=1e-30)).sum()


def joint_probabilities(logits: Tensor) -> Tensor:
    """Logits (n, bits) of independent bits -> probabilities (n, 2^bits) of all bit words, first bit highest."""
    p = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        p_one = bit.sigmoid()[:, None]
        p = torch.stack([p * (1 - p_one), p * p_one], 2).flatten(1)
    return p
