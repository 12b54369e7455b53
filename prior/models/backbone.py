"""What the transformer priors share: their settings, the parts around their blocks, and how these are initialised."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prior.models.base import PriorModel
from prior.models.transformer import RMSNorm, Stack, head_size, initialise_blocks, rotary


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """The settings that all transformer priors take, from conf/prior and conf/prior/size."""

    inputs: str  # "codes" or "embedding", as in CodeEmbedding
    width: int
    depth: int  # blocks
    heads: int  # of each block
    dropout: float  # of the summed inputs, attention, and what each block adds


class Transformer(PriorModel):
    """A prior that adds a vector for each position to what it reads, runs stacks of blocks, and predicts by a linear head.

    A subclass creates its embeddings of codes and labels and calls `add_backbone`; all parts are its own attributes, since
    checkpoints know them by these names.
    """

    angles: Tensor
    place: nn.Parameter
    drop: nn.Dropout
    norm: RMSNorm

    def add_backbone(
        self,
        settings: TransformerSettings,
        depths: dict[str, int],
        causal: bool = True,
    ) -> None:
        """Add vectors and angles of the positions, the stacks of blocks (name -> depth), the last norm and the head."""
        width, heads, dropout = settings.width, settings.heads, settings.dropout
        angles = self.make_angles(head_size(width, heads))
        self.register_buffer("angles", angles, persistent=False)
        # Rotary angles are relative: without these vectors all positions of an empty grid would look alike.
        self.place = nn.Parameter(torch.zeros(self.T, width))
        self.drop = nn.Dropout(dropout)
        stacks = {name: Stack(n, width, heads, dropout, causal) for name, n in depths.items()}
        for name, stack in stacks.items():
            self.add_module(name, stack)
        self.norm = RMSNorm(width)
        self.head = self.make_head(width)
        initialise_blocks(block for stack in stacks.values() for block in stack)
        nn.init.normal_(self.place, std=0.02)
        for p in self.head.parameters():
            nn.init.zeros_(p)  # an untrained prior is uniform

    def make_angles(self, size: int) -> Tensor:
        """The rotary angles of the positions, (T, 1, 1, size / 2)."""
        return rotary(self.grid, size)

    def make_head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.K, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """The last block's output (..., width) -> logits (..., K) float32."""
        logits: Tensor = self.head(self.norm(x))
        return logits.float()
