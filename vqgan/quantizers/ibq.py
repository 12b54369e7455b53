"""A codebook of which every code hears of every choice."""

import torch
from torch import Tensor

from vqgan.quantizers.base import Quantized, flatten, float32, unflatten
from vqgan.quantizers.codebook import softly
from vqgan.quantizers.vq import VQ


class IBQ(VQ):
    """Index backpropagation (Shi et al. 2024, IBQ, eq. 4-8): the choice is one-hot forward and a softmax backward.

    The decoder's gradient reaches z_e and all codes through softmax(scores) and the chosen code directly. Scores are
    z_e . e - |e|^2 / 2: the paper has the inner product alone, which favours long codes; less half the squared length
    the best score is the nearest code, so that k-means and revival put codes where they are chosen. With `cosine` both
    are the same. The loss asks the same twice (the paper's double quantization loss): of the code by itself, and
    through the choice. Training holds a few n x K matrices; evaluation doesn't.
    """

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        q = super().forward(z_e)
        if not (self.training and torch.is_grad_enabled()):
            return q
        assert q.indices is not None
        rows, codes = flatten(q.z_e), self.codes()
        p = torch.softmax(rows @ codes.t() - codes.square().sum(1) / 2, 1)
        z_q = unflatten(softly(p, q.indices.flatten(), codes), z_e)
        twice = (z_q - q.z_e.detach()).square().mean()
        return Quantized(
            q.z_e, z_q, q.indices, q.loss + twice, {**q.terms, "double": twice.detach()}
        )
