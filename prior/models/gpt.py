"""A causal transformer over code grids in raster order."""

import torch
from torch import Tensor, nn

from prior.decoding.kv_decoder import make_steps
from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import (
    Block,
    RMSNorm,
    head_size,
    initialise_blocks,
    rotary,
    rotary_directions,
)


class GPT(Autoregressive):
    """Codes in raster order (VQGAN, Esser et al. 2021, section 3.2), with blocks as in Llama: RMSNorm, SwiGLU, 2-D rotary
    positions."""

    stepwise = True
    angles: Tensor

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        inputs: str = "codes",
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__(single_codebook(codebook), grid, classes, token_dropout)
        self.register_buffer("angles", rotary(grid, head_size(width, heads)), persistent=False)
        self.read = CodeEmbedding(codebook[0], width, inputs)
        self.begin = LabelEmbedding(
            classes, width
        )  # what stands where the code before the first would
        self.place = nn.Parameter(torch.zeros(self.T, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, self.K, bias=False)
        initialise_blocks(self.blocks)
        nn.init.normal_(self.place, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.predict(codes, labels, *self.places())

    def places(self) -> tuple[Tensor, Tensor]:
        """What tells the steps where they are: vectors (T, width), added to what they read, and the blocks' angles."""
        return self.place, self.angles

    def predict(self, codes: Tensor, labels: Tensor | None, told: Tensor, angles: Tensor) -> Tensor:
        """The logits (B, T, K) of codes in any order, of which `told` and `angles` know."""
        x = torch.cat([self.begin(len(codes), labels)[:, None], self.read(codes[:, :-1])], 1)
        x = self.drop(x + told)
        towards = rotary_directions(angles)
        for block in self.blocks:
            x = block(x, towards)
        logits: Tensor = self.head(self.norm(x))
        return logits.float()

    def decoder(self, n: int, labels: Tensor | None = None) -> StepDecoder:
        told, angles = self.places()
        over = make_steps(self.blocks, angles, n, self.kept)

        def decode(before: Tensor | None) -> Tensor:
            x = self.begin(n, labels) if before is None else self.read(before)
            logits: Tensor = self.head(self.norm(over(x + told[over.t])))
            return logits.float()

        return decode
