"""What a prior reads: codes and labels as vectors of its own width."""

import torch
from torch import Tensor, nn

from engine.errors import InputError

INPUTS = ("codes", "embedding")


class CodeEmbedding(nn.Module):
    """Codes as vectors: those of the tokenizer, projected (inputs="codes"), or an embedding of their own ("embedding")."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, width: int, inputs: str = "codes") -> None:
        """vectors (K, dim), of one codebook."""
        super().__init__()
        if inputs not in INPUTS:
            raise InputError(f"prior.inputs={inputs} must be one of {', '.join(INPUTS)}")
        self.register_buffer("vectors", vectors.detach().clone().float())
        self.read: nn.Module = (
            nn.Embedding(len(vectors), width)
            if inputs == "embedding"
            else nn.Linear(vectors.shape[1], width)
        )
        self.initialise()

    def initialise(self, std: float = 0.02) -> None:
        """Vectors as in GPT-2; projected ones come out with a length of about 1 each, whatever theirs was."""
        if isinstance(self.read, nn.Linear):
            std = 1 / float(self.vectors.square().sum(1).mean().sqrt().clamp(min=1e-3))
            nn.init.zeros_(self.read.bias)
        nn.init.normal_(self.read.weight, std=std)  # type: ignore[arg-type]

    def forward(self, codes: Tensor) -> Tensor:
        """codes (...) int64 in [0, K) -> (..., width)."""
        found: Tensor = self.read(
            codes if isinstance(self.read, nn.Embedding) else self.vectors[codes]
        )
        return found


class LabelEmbedding(nn.Module):
    """A vector of each class and one of none in particular; all start at zero."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes, self.vectors = classes, nn.Parameter(torch.zeros(classes + 1, width))

    def forward(self, n: int, labels: Tensor | None) -> Tensor:
        """labels (n,) in [0, classes), -1 for none in particular, or no labels -> (n, width)."""
        if labels is None:
            return self.vectors[-1].expand(n, -1)
        return self.vectors[torch.where(labels < 0, self.classes, labels)]
