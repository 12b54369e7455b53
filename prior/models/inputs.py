"""What a prior reads: codes and labels as vectors of the prior's width."""

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.precision import at_least_float32

INPUTS = ("codes", "embedding")
HIDDEN = 256  # width of the layer between a vector of numbers and the prior


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

    @property
    def width(self) -> int:
        """The width of the vectors that it returns."""
        weight = self.read.weight
        assert isinstance(weight, Tensor)
        return weight.shape[isinstance(self.read, nn.Embedding)]

    @property
    def inputs(self) -> str:
        """One of INPUTS."""
        return INPUTS[isinstance(self.read, nn.Embedding)]


class LabelEmbedding(nn.Module):
    """One vector per class and one for no class; all start at zero.

    After `read_vectors`, labels are vectors of numbers, which a small network maps. After `ignore_labels`, only the vector for no
    class is returned, since the prior reads its labels elsewhere.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.vectors = nn.Parameter(torch.zeros(classes + 1, width))
        self.numbers: VectorEmbedding | None = None
        self.reads_labels = True

    def read_vectors(self, mean: Tensor, deviation: Tensor) -> None:
        """Read labels (n, size) float from now on; mean and deviation (size,) are those of the training images."""
        self.numbers = VectorEmbedding(mean, deviation, self.vectors.shape[1])

    def ignore_labels(self) -> None:
        """Read no labels from now on."""
        self.reads_labels = False

    def forward(self, n: int, labels: Tensor | None) -> Tensor:
        """labels (n,) in [0, classes), -1 for no class; or (n, size) float, all NaN for none; or None for no labels
        -> (n, width)."""
        if labels is None or not self.reads_labels:
            return self.vectors[-1].expand(n, -1)
        if self.numbers is None:
            return self.vectors[torch.where(labels < 0, self.classes, labels)]
        is_blank = labels.isnan().all(1, keepdim=True)
        return torch.where(is_blank, self.vectors[-1], at_least_float32(self.numbers(labels)))


class VectorEmbedding(nn.Module):
    """Vectors of numbers, standardised, through a layer of HIDDEN units to the prior's width; starts at zero.

    A number that is missing, NaN, counts as the mean, and a second input says that it is missing.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, width: int) -> None:
        """mean and deviation (size,) float32."""
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())
        last = nn.Linear(HIDDEN, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(2 * len(mean), HIDDEN), nn.SiLU(), last)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors (n, size) -> (n, width)."""
        missing = vectors.isnan()
        standardised = ((vectors - self.mean) / self.deviation).masked_fill(missing, 0)
        embedded: Tensor = self.layers(torch.cat([standardised, missing.to(vectors.dtype)], 1))
        return embedded


def blank_like(labels: Tensor) -> Tensor:
    """Labels that say nothing, in the form of these."""
    return torch.full_like(labels, blank_value(labels))


def blank_value(labels: Tensor) -> float:
    """What a label that says nothing is filled with: -1 for classes and codes, NaN for numbers."""
    return torch.nan if labels.is_floating_point() else -1
