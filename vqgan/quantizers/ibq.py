"""A codebook in which every choice has a gradient to every code."""

import torch
from torch import Tensor

from vqgan.quantizers.base import Quantized
from vqgan.quantizers.gradients import soft_lookup
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import flatten, unflatten
from vqgan.quantizers.vq import VQ


class IBQ(VQ):
    """Index backpropagation (Shi et al. 2024, IBQ, eq. 4-8): the choice is one-hot forward and a softmax backward.

    The decoder's gradient reaches z_e and all codes through softmax(scores), and the chosen code directly. Scores are
    z_e . e - |e|^2 / 2. The paper uses the inner product alone, which favours long codes. With half the squared length
    subtracted, the best score is the nearest code, so k-means and revival put codes where they are chosen; with
    `cosine` both scores agree. The loss applies the codebook term twice (the paper's double quantization loss): to the
    code directly, and through the softmax. Training holds a few n x K matrices; evaluation holds none.
    """

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        q = super().forward(z_e)
        if not (self.training and torch.is_grad_enabled()):
            return q
        assert q.indices is not None
        codes = self.codes()
        p = torch.softmax(flatten(q.z_e) @ codes.t() - codes.square().sum(1) / 2, 1)
        z_q = unflatten(soft_lookup(p, q.indices.flatten(), codes), z_e)
        double = (z_q - q.z_e.detach()).square().mean()
        terms = {**q.terms, "double": double.detach()}
        return Quantized(q.z_e, z_q, q.indices, q.loss + double, terms)
