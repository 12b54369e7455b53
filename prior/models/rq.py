"""A transformer over positions and a small one over the codes of each, for tokenizers with several codebooks."""

from collections.abc import Generator

import torch
from torch import Tensor, nn

from prior.decoding.kv_decoder import make_steps
from prior.models.base import Autoregressive, StepDecoder
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import (
    Block,
    RMSNorm,
    head_size,
    initialise_blocks,
    rotary,
    rotary_directions,
)


class RQ(Autoregressive):
    """RQ-transformer (Lee et al. 2022, section 3.2): p(code d of position t | all before it).

    A spatial transformer reads each position as one vector, the sum of its codes', and says h_t of the positions before
    t; a depth transformer, whose first input is h_t and whose d-th the sum of the first d - 1 codes' vectors, predicts
    the codes of t one after the other. Attention over T and over `num_codebooks` steps costs far less than over T * num_codebooks.
    Each book has inputs and a head of its own: here, unlike in the paper, its codes are no other book's.
    """

    stepwise = True
    angles: Tensor
    book_angles: Tensor

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        inputs: str = "codes",
        width: int = 192,
        depth: int = 6,
        codebook_depth: int = 2,
        heads: int = 6,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__(codebook, grid, classes, token_dropout)
        size = head_size(width, heads)
        self.register_buffer("angles", rotary(grid, size), persistent=False)
        self.register_buffer("book_angles", rotary((1, self.num_codebooks), size), persistent=False)
        self.read = nn.ModuleList(CodeEmbedding(vectors, width, inputs) for vectors in codebook)
        self.begin = LabelEmbedding(
            classes, width
        )  # what stands where the position before the first would
        self.place, self.book = (
            nn.Parameter(torch.zeros(self.T, width)),
            nn.Parameter(torch.zeros(self.num_codebooks, width)),
        )
        self.drop = nn.Dropout(dropout)
        self.over_places = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.over_books = nn.ModuleList(Block(width, heads, dropout) for _ in range(codebook_depth))
        self.norm = RMSNorm(width)
        self.head = nn.ModuleList(
            nn.Linear(width, self.K, bias=False) for _ in range(self.num_codebooks)
        )
        initialise_blocks(
            nn.ModuleList([*self.over_places, *self.over_books])
        )  # one residual stream runs through both
        for told in (self.place, self.book):
            nn.init.normal_(told, std=0.02)
        for head in self.head:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        by_book = codes.view(len(codes), self.T, self.num_codebooks).unbind(2)
        sums = torch.stack(
            [read(code) for read, code in zip(self.read, by_book, strict=True)], 2
        ).cumsum(2)
        begin = self.begin(len(codes), labels)[:, None]
        h = self.drop(torch.cat([begin, sums[:, :-1, -1]], 1) + self.place)
        towards = rotary_directions(self.angles)
        for block in self.over_places:
            h = block(h, towards)
        v = torch.cat([h[:, :, None], sums[:, :, :-1]], 2)  # (B, T, num_codebooks, width)
        v = self.drop(v + self.book).flatten(0, 1)  # (B * T, num_codebooks, width)
        towards = rotary_directions(self.book_angles)
        for block in self.over_books:
            v = block(v, towards)
        logits = torch.stack(
            [head(x) for head, x in zip(self.head, self.norm(v).unbind(1), strict=True)], 1
        )
        return logits.view(len(codes), self.L, self.K).float()

    def decoder(self, n: int, labels: Tensor | None = None) -> StepDecoder:
        return self._decode(n, labels).send

    def _decode(self, n: int, labels: Tensor | None) -> Generator[Tensor, Tensor | None, None]:
        """Yields the logits (n, K) of the next code, is sent that code."""
        x, over_places = (
            self.begin(n, labels),
            make_steps(self.over_places, self.angles, n, self.kept),
        )
        over_books = make_steps(self.over_books, self.book_angles, n, self.kept)
        for place in self.place:
            v, x = over_places(x + place), torch.zeros_like(x)
            over_books.restart()
            for book, read, head in zip(self.book, self.read, self.head, strict=True):
                code = yield head(self.norm(over_books(v + book))).float()
                v = x = x + read(code)
