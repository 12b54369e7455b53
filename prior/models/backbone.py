"""What the transformer priors share: their settings, the parts around their blocks, and how these are initialised."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from prior.decoding.kv_decoder import CompiledKVSteps, KVSteps, StepCache, make_steps
from prior.heads.base import LOGITS, Head
from prior.heads.several import HeadPerCodebook
from prior.heads.softmax import plain_softmax
from prior.models.base import PriorModel
from prior.models.front import join_angles
from prior.models.inputs import CodeEmbedding
from prior.models.transformer import RMSNorm, Stack, head_size, initialise_blocks, rotary


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """The settings that all transformer priors take, from conf/prior and conf/prior/size."""

    inputs: str  # "codes" or "embedding", as in CodeEmbedding
    width: int
    depth: int  # blocks
    heads: int  # of each block
    dropout: float  # of the summed inputs, attention, and what each block adds
    head: Callable[[int, Tensor], Head] = (
        plain_softmax  # from the width and the vectors of a codebook
    )

    def __post_init__(self) -> None:
        if not callable(self.head):
            raise InputError(f"prior.head={self.head} is no head; choose one with prior/head=bits")


class Transformer(PriorModel):
    """A prior that adds a vector for each position to what it reads, runs stacks of blocks, and predicts by a head.

    A subclass creates its embeddings of codes, `read`, and of labels and calls `add_backbone`; all parts are its own attributes,
    since checkpoints know them by these names.
    """

    read: Any  # a CodeEmbedding, or a list with that of each codebook
    head: Head
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
        self.head = self.make_head(settings)
        initialise_blocks(block for stack in stacks.values() for block in stack)
        nn.init.normal_(self.place, std=0.02)

    def make_head(self, settings: TransformerSettings) -> Head:
        """The head of each codebook, which `read` has the vectors of."""
        if isinstance(self.read, nn.ModuleList):
            vectors = [read.vectors for read in self.read if isinstance(read, CodeEmbedding)]
            return HeadPerCodebook(settings.head(settings.width, v) for v in vectors)
        return settings.head(settings.width, self.read.vectors)

    @property
    def readout(self) -> Head:
        return self.head if self.has_features else LOGITS

    def run_stack(self, stack: Stack, x: Tensor, angles: Tensor, labels: Tensor | None) -> Tensor:
        """A stack on what the positions read, x (B, T, width), after the codes in front if there are any -> (B, T, width)."""
        if self.front is None:
            x = stack(self.drop(x), angles)
            return x
        joined = torch.cat([self.front(x.shape[0], labels), x], 1)
        joined = stack(self.drop(joined), join_angles(self.front.angles, angles))
        return joined[:, self.front.T :]

    def start_steps(
        self,
        stack: Stack,
        angles: Tensor,
        n: int,
        labels: Tensor | None,
        cache: StepCache | None,
    ) -> KVSteps | CompiledKVSteps:
        """The cached steps of n samples through a stack, after the codes in front if there are any."""
        if self.front is None:
            return make_steps(stack, angles, n, cache)
        steps = make_steps(stack, join_angles(self.front.angles, angles), n, cache)
        for x in self.front(n, labels).unbind(1):
            steps(x)
        return steps

    def derive_buffers(self) -> None:
        super().derive_buffers()
        # As many pairs of channels as there are turn.
        self.angles = self.make_angles(2 * self.angles.shape[-1]).to(self.angles.device)

    def make_angles(self, size: int) -> Tensor:
        """The rotary angles of the positions, (T, 1, 1, size / 2)."""
        return rotary(self.grid, size)

    def logits(self, x: Tensor) -> Tensor:
        """The last block's output (..., width) -> logits (..., K) float32."""
        return self.head.logits(self.norm(x))
