"""A transformer over positions and a small one over the codes of each, for tokenizers with several codebooks."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from prior.decoding.kv_decoder import StepCache, make_steps
from prior.heads.several import HeadPerCodebook
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import Autoregressive, StepDecoder
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import Stack, rotary


class RQ(Transformer, Autoregressive):
    """RQ-transformer (Lee et al. 2022, section 3.2): p(code d of position t | all codes before it).

    A spatial transformer reads each position as one vector, the sum of its codes' vectors, and summarises the positions
    before t as h_t. A depth transformer, whose first input is h_t and whose d-th input is the sum of the first d - 1 codes'
    vectors, predicts the codes of t one after the other. Attention over T and over `num_codebooks` steps costs far less than
    attention over T * num_codebooks. Unlike in the paper, codebooks are not shared, so each has its own inputs and head.
    """

    stepwise = True
    takes_front = True
    over_places: Stack
    over_books: Stack
    read: nn.ModuleList
    head: HeadPerCodebook
    book_angles: Tensor

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        *,
        codebook_depth: int,
        token_dropout: float,
        **network: Any,
    ) -> None:
        """`network` are the TransformerSettings, whose depth is that of the spatial transformer."""
        super().__init__(codebook, grid, classes, token_dropout)
        settings = TransformerSettings(**network)
        width = settings.width
        self.read = nn.ModuleList(CodeEmbedding(v, width, settings.inputs) for v in codebook)
        self.begin = LabelEmbedding(
            classes, width
        )  # read in place of the position before the first
        depths = {"over_places": settings.depth, "over_books": codebook_depth}
        self.add_backbone(settings, depths)
        self.book = nn.Parameter(torch.zeros(self.num_codebooks, width))
        nn.init.normal_(self.book, std=0.02)
        book_angles = self.make_book_angles(width // settings.heads)
        self.register_buffer("book_angles", book_angles, persistent=False)

    def make_book_angles(self, size: int) -> Tensor:
        """As `make_angles`, of the codebooks: (num_codebooks, 1, 1, size / 2)."""
        return rotary((1, self.num_codebooks), size)

    def derive_buffers(self) -> None:
        super().derive_buffers()
        size, device = 2 * self.book_angles.shape[-1], self.book_angles.device
        self.book_angles = self.make_book_angles(size).to(device)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head.logits(self.features(codes, labels))

    def features(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        by_book = codes.view(codes.shape[0], self.T, self.num_codebooks).unbind(2)
        vectors = [read(code) for read, code in zip(self.read, by_book, strict=True)]
        sums = torch.stack(vectors, 2).cumsum(2)  # (B, T, num_codebooks, width)
        begin = self.begin(codes.shape[0], labels)[:, None]
        x = torch.cat([begin, sums[:, :-1, -1]], 1)
        h = self.run_stack(self.over_places, x + self.place, self.angles, labels)
        v = torch.cat([h[:, :, None], sums[:, :, :-1]], 2)
        v = self.drop(v + self.book).flatten(0, 1)  # (B * T, num_codebooks, width)
        v = self.norm(self.over_books(v, self.book_angles))
        return v.view(codes.shape[0], self.L, v.shape[-1])

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        return self._decode(n, labels, cache).send

    def _decode(
        self, n: int, labels: Tensor | None, cache: StepCache | None
    ) -> Generator[Tensor, Tensor | None, None]:
        """Yields the logits (n, K) of the next code and is sent that code."""
        over_places = self.start_steps(self.over_places, self.angles, n, labels, cache)
        over_books = make_steps(self.over_books, self.book_angles, n, cache)
        x = self.begin(n, labels)
        for place in self.place:
            v = over_places(x + place)
            x = torch.zeros_like(x)
            over_books.restart()
            for book, read, head in zip(self.book, self.read, self.head.heads, strict=True):
                code = yield head.logits(self.norm(over_books(v + book)))
                v = x = x + read(code)
