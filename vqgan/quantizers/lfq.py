"""Signs, one bit a channel."""

import torch.nn.functional as F
from torch import Tensor

from engine.errors import InputError, check_range
from vqgan.quantizers.base import Quantized, float32, straight_through
from vqgan.quantizers.entropy import Entropy
from vqgan.quantizers.lattice import Lattice


class LFQ(Lattice):
    """Lookup-free quantization (Yu et al. 2023, MAGVIT-v2, section 3.1): the code of log2 K bits is the signs of z_e.

    beta weighs the mean square of z_e - sg(z_q). `entropy` makes each bit sure and all codes used (eq. 5); it is computed
    exactly for any K, since the bits of one output are independent.
    """

    def __init__(
        self,
        K: int = 512,
        beta: float = 0.25,
        entropy: Entropy | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__((2,) * bits_for(K), dim)
        check_range("quantizer.beta", beta, 0)
        self.beta, self.entropy, self.size = (
            beta,
            entropy,
            1.0,
        )  # size: of a coordinate, plus or minus

    def scaled(self, z: Tensor) -> Tensor:
        """z (B, dim, h, w) of unit scale as it is compared with the codes."""
        return z

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        u = self.scaled(self.standard(z_e.float()))
        indices = self.index((u > 0).movedim(1, -1))
        code = self.value(self.digits(indices)).movedim(-1, 1)
        commitment = (u - code).square().mean()
        loss, terms = self.beta * commitment, {"commitment": commitment.detach()}
        if self.entropy is not None and self.entropy.at(self.updates):
            # The squared distances to the two values of a bit differ by 4 * u * size.
            logits = u.movedim(1, -1).flatten(0, -2) * (4 * self.size / self.entropy.temperature)
            sure, spread = self.entropy.of_bits(logits)
            loss = loss + self.entropy.loss(sure, spread, self.updates)
            terms |= {"entropy_sample": sure.detach(), "entropy_codebook": spread.detach()}
        z_q = straight_through(self.original(u), self.original(code))
        return Quantized(z_e.float(), z_q, indices, loss, terms)

    def value(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1) * self.size


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al. 2024, section 3): signs of a vector of length 1, scaled to length 1.

    The error of z_e against its code is bounded, which LFQ's is not.
    """

    def __init__(
        self,
        K: int = 512,
        beta: float = 0.25,
        entropy: Entropy | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__(K, beta, entropy, dim)
        self.size = self.dim**-0.5

    def scaled(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)


def bits_for(K: int) -> int:
    """log2 K of a power of two; another K is refused with the powers beside it."""
    if not isinstance(K, int) or K < 2:
        raise InputError(f"quantizer.K={K} must be a whole number of at least 2 codes")
    bits = K.bit_length() - 1
    if 2**bits != K:
        near = f"{2**bits} and {2 ** (bits + 1)}"
        raise InputError(
            f"quantizer.K={K} is no power of two, which one bit a channel needs; the nearest are {near}"
        )
    return bits
