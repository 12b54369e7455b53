"""A codebook in which every choice has a gradient to every code."""

from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.gradients import soft_lookup
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import flatten, unflatten
from vqgan.quantizers.vq import VQ

CODE_SCORES = ("nearest", "inner_product")


class IBQ(VQ):
    """Index backpropagation (Shi et al. 2024, IBQ, eq. 4-8): the choice is one-hot forward and a softmax backward.

    The decoder's gradient reaches z_e and all codes through softmax(scores), and the chosen code directly. With
    score="nearest", scores are z_e . e - |e|^2 / 2: the best score is the nearest code, so k-means and revival put codes
    where they are chosen. With score="inner_product", as in the paper and in its published weights, they are z_e . e, which
    favours long codes. With `cosine` both agree. The loss applies the codebook term twice (the paper's double quantization
    loss): to the code directly, and through the softmax. Training holds a few n x K matrices; evaluation holds none.
    """

    def __init__(self, K: int, dim: int, score: str, **switches: Any) -> None:
        super().__init__(K, dim, **switches)
        if score not in CODE_SCORES:
            raise InputError(f"quantizer.score={score} must be one of {', '.join(CODE_SCORES)}")
        if self.decoder_moves_codes:
            raise InputError(
                f"quantizer.gradient={self.gradient} can't be set for ibq, which has a gradient of its own; leave it out"
            )
        self.score = score

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        q = super().forward(z_e)
        if not (self.training and torch.is_grad_enabled()):
            return q
        assert q.indices is not None
        codes = self.codes()
        p = torch.softmax(flatten(q.z_e) @ codes.t() - self.offsets(codes), 1)
        z_q = unflatten(soft_lookup(p, q.indices.flatten(), codes), z_e)
        double = (z_q - q.z_e.detach()).square().mean()
        terms = {**q.terms, "double": double.detach()}
        return Quantized(q.z_e, z_q, q.indices, q.loss + double, terms)

    def offsets(self, codes: Tensor) -> Tensor:
        if self.score == "nearest":
            return super().offsets(codes)
        return codes.new_zeros(len(codes))

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        if self.score == "nearest":
            return super().distances(z, codes)
        return -2 * z @ codes.t()
