"""What the codes of an image cost a prior, as a loss of the encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import check_range
from codegrid.engine.module import MakeOptimizer
from vqgan.discriminators.base import frozen
from vqgan.losses.code_models import CodeModel
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.gradients import soft_lookup
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import flatten


class CodeCost(nn.Module):
    """weight * the mean nats of a code under a small causal model that trains beside the tokenizer.

    The model learns the codes themselves. To the encoder the nats are those expected under a soft assignment of each output to
    all codes, p = softmax(-d^2 / (softness * mean d^2 to the chosen code)), so that it learns which near code would be cheaper:
    in place of the code that is predicted, and, by the gradient of the model's inputs, in place of those that it is predicted
    from. The inputs' values are those of the codes. So it is entropy-constrained quantization (Chou, Lookabaugh & Gray 1989)
    with a conditional entropy, whose decision is left to the encoder. The codes get no gradient. A large weight makes all
    images alike: no code is cheaper than the one that is always used.
    """

    def __init__(
        self, weight: float, softness: float, model: CodeModel, optimizer: MakeOptimizer
    ) -> None:
        super().__init__()
        check_range("loss.code_cost", weight, 0)
        check_range("loss.code_softness", softness, 1e-6)
        self.weight, self.softness = weight, softness
        self.model = model
        self.make_optimizer = optimizer

    @float32
    def forward(self, quantizer: Quantizer, q: Quantized) -> Tensor:
        """The weighted expected nats of a code, a scalar with a gradient to the encoder alone."""
        p = [self.assign_softly(*part) for part in quantizer.list_parts(q)]
        indices = list_codes(quantizer, q)
        with frozen(self.model):
            vectors = [
                soft_lookup(own_p, own.flatten(), table).view(*own.shape, -1)
                for own_p, own, table in zip(p, indices, self.model.tables, strict=False)
            ]
            nats = [-logits.log_softmax(-1).flatten(0, 1) for logits in self.model(vectors)]
        costs = [(own_p * own).sum(1).mean() for own_p, own in zip(p, nats, strict=True)]
        return self.weight * torch.stack(costs).mean()

    def assign_softly(self, quantizer: Quantizer, q: Quantized) -> Tensor:
        """Probabilities (n, K) of the codes of one codebook for each output."""
        assert q.indices is not None
        z = flatten(quantizer.compared(q).float())
        [codes] = quantizer.code_vectors().float()
        squared = z.square().sum(1, keepdim=True) - 2 * z @ codes.t() + codes.square().sum(1)
        chosen = squared.detach().gather(1, q.indices.flatten()[:, None]).mean()
        scale = self.softness * chosen.clamp(min=torch.finfo(chosen.dtype).tiny)
        return torch.softmax(-squared / scale, 1)

    @float32
    def learn(self, quantizer: Quantizer, q: Quantized) -> Tensor:
        """The mean nats of a code, a scalar with a gradient to the model alone."""
        indices = list_codes(quantizer, q)
        tables = self.model.tables
        vectors = [F.embedding(own, table) for own, table in zip(indices, tables, strict=False)]
        nats = [
            F.cross_entropy(logits.flatten(0, 1), own.flatten())
            for logits, own in zip(self.model(vectors), indices, strict=True)
        ]
        return torch.stack(nats).mean()


def list_codes(quantizer: Quantizer, q: Quantized) -> list[Tensor]:
    """The indices (B, T) of each codebook that an output used."""
    codes = [part.indices for _, part in quantizer.list_parts(q)]
    return [own.flatten(1) for own in codes if own is not None]
