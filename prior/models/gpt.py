"""A causal transformer over code grids in raster order."""

import torch
from torch import Tensor, nn

from data.errors import InputError
from prior.models.transformer import Block, Cache, rotary

INPUTS = ("codes", "embedding")


class GPT(nn.Module):
    """p(indices) = product over t of p(index_t | those before) (VQGAN, Esser et al. 2021, eq. 8), in raster order; with
    `classes` above 0, given a label too, or -1 for none.

    What it reads of a code is the tokenizer's vector, projected (inputs="codes"), or an embedding of its own
    (inputs="embedding"). Blocks as in Llama: RMSNorm, SwiGLU, 2-D rotary positions.
    """

    angles: Tensor
    codebook: Tensor

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        inputs: str = "codes",
        classes: int = 0,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if inputs not in INPUTS:
            raise InputError(f"prior.inputs={inputs} must be one of {', '.join(INPUTS)}")
        if width % heads or (width // heads) % 2:
            raise InputError(f"prior.width={width} must be an even multiple of prior.heads={heads}; use prior.width={64 * heads}")
        self.K, self.grid, self.T, self.classes = len(codebook), grid, grid[0] * grid[1], classes
        self.register_buffer("codebook", codebook.detach().clone().float())
        self.register_buffer("angles", rotary(grid, width // heads), persistent=False)
        self.read: nn.Module = nn.Embedding(self.K, width) if inputs == "embedding" else nn.Linear(codebook.shape[1], width)
        # What stands where the code before the first would: a vector of each class, the last one of none.
        self.begin = nn.Parameter(torch.zeros(classes + 1, width))
        self.place = nn.Parameter(torch.zeros(self.T, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, self.K, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            if p.ndim > 1 and p is not self.begin:
                nn.init.normal_(p, std=0.02)
            if name.endswith(("proj.weight", "down.weight")):  # GPT-2: the residual stream keeps its scale
                nn.init.normal_(p, std=0.02 / (2 * len(self.blocks)) ** 0.5)
        if isinstance(self.read, nn.Linear):
            nn.init.normal_(self.read.weight, std=1 / float(self.codebook.square().sum(1).mean().sqrt().clamp(min=1e-3)))
        nn.init.zeros_(self.head.weight)

    def embed(self, indices: Tensor) -> Tensor:
        """indices (B, t) -> (B, t, width)."""
        embedded: Tensor = self.read(indices if isinstance(self.read, nn.Embedding) else self.codebook[indices])
        return embedded

    def first(self, n: int, labels: Tensor | None) -> Tensor:
        """What stands before the first code (n, 1, width), given labels (n,) in [0, classes), -1 for none, or no labels."""
        if labels is None:
            return self.begin[-1].expand(n, 1, -1)
        return self.begin[torch.where(labels < 0, self.classes, labels)][:, None]

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """indices (B, T), labels (B,) -> logits (B, T, K); those at t see the label and the indices before t alone."""
        begin = self.first(len(indices), labels)
        return self._run(torch.cat([begin, self.embed(indices[:, :-1])], 1), slice(0, self.T), None)

    def step(self, previous: Tensor | None, n: int, t: int, cache: Cache, labels: Tensor | None = None) -> Tensor:
        """The logits (n, K) at position t, given the code at t - 1 (n,) (None at t = 0) and the cache of those before."""
        x = self.first(n, labels) if previous is None else self.embed(previous[:, None])
        return self._run(x, slice(t, t + 1), cache)[:, 0]

    def _run(self, x: Tensor, places: slice, cache: Cache | None) -> Tensor:
        x = self.drop(x + self.place[places])
        for layer, block in enumerate(self.blocks):
            x = block(x, self.angles[places], layer, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits.float()
