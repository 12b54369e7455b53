"""A causal transformer over code grids in raster order."""

import torch
from torch import Tensor, nn

from prior.models.base import Autoregressive, Decoder, one_book
from prior.models.inputs import Codes, Labels
from prior.models.transformer import Block, Cache, head_size, initialise, rotary


class GPT(Autoregressive):
    """Codes in raster order (VQGAN, Esser et al. 2021, section 3.2), with blocks as in Llama: RMSNorm, SwiGLU, 2-D rotary
    positions."""

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
        super().__init__(one_book(codebook), grid, classes, token_dropout)
        self.register_buffer("angles", rotary(grid, head_size(width, heads)), persistent=False)
        self.read = Codes(codebook[0], width, inputs)
        self.begin = Labels(classes, width)  # what stands where the code before the first would
        self.place = nn.Parameter(torch.zeros(self.T, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, self.K, bias=False)
        initialise(self.blocks)
        nn.init.normal_(self.place, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        begin = self.begin(len(codes), labels)[:, None]
        return self._run(torch.cat([begin, self.read(codes[:, :-1])], 1), slice(0, self.T), None)

    def decoder(self, n: int, labels: Tensor | None = None) -> Decoder:
        cache = Cache()

        def decode(before: Tensor | None) -> Tensor:
            x = self.begin(n, labels)[:, None] if before is None else self.read(before[:, None])
            return self._run(x, slice(cache.t, cache.t + 1), cache)[:, 0]

        return decode

    def _run(self, x: Tensor, places: slice, cache: Cache | None) -> Tensor:
        x = self.drop(x + self.place[places])
        for layer, block in enumerate(self.blocks):
            x = block(x, self.angles[places], layer, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits.float()
