"""Small causal models of the codes of an image, which say in training what a code costs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import Size
from vqgan.networks.vit import ViTBlock


class CodeModel(nn.Module, ABC):
    """p(code | all codes before it), in raster order, and at a position one codebook after the other.

    It takes vectors of codes instead of codes, so that they can have a gradient. Before training all codes are equally likely.
    """

    def __init__(self, K: int, num_codebooks: int, grid: Size, width: int) -> None:
        super().__init__()
        check_int("loss.code_model.width", width, 1, "channel")
        self.grid = grid
        T = grid[0] * grid[1]
        self.read = nn.ModuleList(nn.Embedding(K, width) for _ in range(num_codebooks))
        self.head = nn.ModuleList(nn.Linear(width, K) for _ in range(num_codebooks))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_codebooks))
        self.place = nn.Parameter(0.02 * torch.randn(T, width))
        for table in self.read.parameters():
            nn.init.normal_(table, std=0.02)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    @property
    def tables(self) -> list[Tensor]:
        """The vectors of all codes (K, width), one table per codebook."""
        return [read.weight for read in self.read if isinstance(read, nn.Embedding)]

    def forward(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The vectors (B, T, width) of each codebook's codes -> the logits (B, T, K) of each codebook."""
        x = self.summarise(torch.stack(list(vectors)).sum(0))
        logits = []
        parts = zip(
            vectors, self.norm, self.head, strict=False
        )  # dropout may skip the last codebooks
        for own, norm, head in parts:
            logits.append(head(norm(x)))
            x = x + own
        return logits

    @abstractmethod
    def summarise(self, vectors: Tensor) -> Tensor:
        """Vectors of positions (B, T, width) -> (B, T, width), of which each depends on the positions before it only."""


class Neighbours(CodeModel):
    """One hidden layer on the code before and the code above."""

    def __init__(self, K: int, num_codebooks: int, grid: Size, width: int) -> None:
        super().__init__(K, num_codebooks, grid, width)
        self.norm_in = nn.LayerNorm(2 * width)
        self.up = nn.Linear(2 * width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def summarise(self, vectors: Tensor) -> Tensor:
        columns = self.grid[1]
        before = F.pad(vectors, (0, 0, 1, -1)) + self.place
        above = F.pad(vectors, (0, 0, columns, -columns)) + self.place
        x = self.norm_in(torch.cat([before, above], -1))
        summary: Tensor = before + self.down(F.gelu(self.up(x)))
        return summary


class CausalBlock(ViTBlock):
    """Each position attends to itself and those before it."""

    is_causal = True


class CausalTransformer(CodeModel):
    """Blocks of attention to all codes before."""

    def __init__(
        self, K: int, num_codebooks: int, grid: Size, width: int, depth: int, heads: int
    ) -> None:
        super().__init__(K, num_codebooks, grid, width)
        check_int("loss.code_model.depth", depth, 1, "block")
        check_int("loss.code_model.heads", heads, 1)
        if width % heads:
            raise InputError(
                f"loss.code_model.width={width} must be a multiple of loss.code_model.heads={heads}; "
                f"use loss.code_model.width={32 * heads}"
            )
        blocks = (CausalBlock(width, heads, 4, gated=False, depth=depth) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)

    def summarise(self, vectors: Tensor) -> Tensor:
        summary: Tensor = self.blocks(F.pad(vectors, (0, 0, 1, -1)) + self.place)
        return summary
