"""What a prior reads: codes and labels as vectors of the prior's width."""

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError

INPUTS = ("codes", "embedding")


class CodeEmbedding(nn.Module):
    """Codes as vectors: the tokenizer's own, projected (inputs="codes"), or a learned embedding (inputs="embedding")."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, width: int, inputs: str) -> None:
        """vectors (K, dim) of one codebook."""
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
        """Initialise embeddings as GPT-2 does, and the projection so that its outputs have a length of about 1 per channel,
        whatever the length of the tokenizer's vectors."""
        if isinstance(self.read, nn.Linear):
            std = 1 / float(self.vectors.square().sum(1).mean().sqrt().clamp(min=1e-3))
            nn.init.zeros_(self.read.bias)
        nn.init.normal_(self.read.weight, std=std)  # type: ignore[arg-type]

    def forward(self, codes: Tensor) -> Tensor:
        """codes (...) int64 in [0, K) -> (..., width)."""
        x = codes if isinstance(self.read, nn.Embedding) else self.vectors[codes]
        embedded: Tensor = self.read(x)
        return embedded

    @torch.no_grad()
    def tabulate(self) -> Tensor:
        """The vectors (K, width) of all codes, in the precision in which they are read here."""
        return self(torch.arange(len(self.vectors), device=self.vectors.device))


class LabelEmbedding(nn.Module):
    """One vector per class and one for no class; all start at zero."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.vectors = nn.Parameter(torch.zeros(classes + 1, width))

    def forward(self, n: int, labels: Tensor | None) -> Tensor:
        """labels (n,) in [0, classes), -1 for no class, or None for no labels -> (n, width)."""
        if labels is None:
            return self.vectors[-1].expand(n, -1)
        return self.vectors[torch.where(labels < 0, self.classes, labels)]
