"""Signs: one bit per channel."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError, check_range
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.entropy import Entropy
from vqgan.quantizers.gradients import straight_through
from vqgan.quantizers.lattice import Lattice
from vqgan.quantizers.precision import float32


class LFQ(Lattice):
    """Lookup-free quantization (Yu et al. 2023, MAGVIT-v2, section 3.1): the log2(K) bits of a code are the signs of z_e.

    beta weighs the mean square of z_e - sg(z_q). `entropy` makes each bit confident and spreads the use of the codes
    (eq. 5). It is exact for any K, because the bits of one output are independent. `magnitude` is the absolute value of
    every coordinate of a code.
    """

    training_settings = ("beta", "entropy")

    def __init__(
        self, K: int, beta: float, entropy: Entropy | None, dim: int | None, **when: Any
    ) -> None:
        super().__init__((2,) * count_bits(K), dim, **when)
        check_range("quantizer.beta", beta, 0)
        self.beta = beta
        self.entropy = entropy
        self.magnitude = 1.0

    def project(self, z: Tensor) -> Tensor:
        """Standardised z (B, dim, h, w) -> the vectors that are compared with the codes."""
        return z

    @float32
    def bypass(self, z_e: Tensor) -> Quantized:
        return super().bypass(self.unstandardise(self.project(self.standardise(z_e.float()))))

    @float32
    def compared(self, q: Quantized) -> Tensor:
        return self.unstandardise(self.project(self.standardise(q.z_e)))

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        u = self.project(self.standardise(z_e.float()))
        indices = self.to_index((u > 0).movedim(1, -1))
        code = self.coordinates(self.to_digits(indices)).movedim(-1, 1)
        commitment = (u - code).square().mean()
        loss = self.beta * commitment
        terms = {"commitment": commitment.detach()}
        if self.entropy is not None and self.entropy.weight_at(self.num_updates):
            # The squared distances to the two values of a bit differ by 4 * u * magnitude.
            scale = 4 * self.magnitude / self.entropy.temperature
            logits = u.movedim(1, -1).flatten(0, -2) * scale
            per_sample, of_codebook = self.entropy.from_bits(logits)
            loss = loss + self.entropy.loss(per_sample, of_codebook, self.num_updates)
            terms["entropy_sample"] = per_sample.detach()
            terms["entropy_codebook"] = of_codebook.detach()
        z_q = straight_through(self.unstandardise(u), self.unstandardise(code))
        return Quantized(z_e.float(), z_q, indices, loss, terms)

    def coordinates(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1) * self.magnitude


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al. 2024, section 3): signs of a vector of length 1, scaled to length 1.

    The distance from z_e to its code is bounded, unlike in LFQ.
    """

    def __init__(
        self, K: int, beta: float, entropy: Entropy | None, dim: int | None, **when: Any
    ) -> None:
        super().__init__(K, beta, entropy, dim, **when)
        self.magnitude = self.dim**-0.5

    def project(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)


def count_bits(K: int) -> int:
    """log2(K). Raises InputError with the nearest powers if K is not a power of two."""
    if not isinstance(K, int) or K < 2:
        raise InputError(f"quantizer.K={K} must be a whole number of at least 2 codes")
    bits = K.bit_length() - 1
    if 2**bits != K:
        raise InputError(
            f"quantizer.K={K} is no power of two, which one bit a channel needs; "
            f"the nearest are {2**bits} and {2 ** (bits + 1)}"
        )
    return bits
