"""What the priors have in common that fill in masked codes, in any order or many at once."""

import zlib

import torch
from torch import Tensor, nn

from prior.decoding.sampling import Numbers, Sampler, guided
from prior.models.base import Prediction, PriorModel, double_for_guidance, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import (
    Block,
    RMSNorm,
    head_size,
    initialise_blocks,
    rotary,
    rotary_directions,
)


class Masked(PriorModel):
    """A transformer that predicts masked codes from all others, whatever their places.

    Codes drawn one after the other in any order follow a distribution, the mean of those of all orders. What it is judged
    by is the bound on that of order-agnostic models (Hoogeboom et al. 2022, section 3), which is also that of diffusion to
    an absorbing state in continuous time (Austin et al. 2021, section 4).
    """

    exact = False
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
    ) -> None:
        super().__init__(single_codebook(codebook), grid, classes)
        self.register_buffer("angles", rotary(grid, head_size(width, heads)), persistent=False)
        self.read = CodeEmbedding(codebook[0], width, inputs)
        self.unread = nn.Parameter(torch.zeros(width))  # what stands where a code is masked
        self.label = LabelEmbedding(classes, width)
        self.place = nn.Parameter(
            torch.zeros(self.T, width)
        )  # angles alone would leave the places of an empty grid alike
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, causal=False) for _ in range(depth)
        )
        self.norm, self.head = RMSNorm(width), nn.Linear(width, self.K, bias=False)
        initialise_blocks(self.blocks)
        nn.init.normal_(self.place, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, L), of which those masked (B, L) are not read, labels (B,) -> logits (B, L, K) float32."""
        x = torch.where(masked[..., None], self.unread, self.read(codes))
        x = self.drop(x + self.place + self.label(len(codes), labels)[:, None])
        towards = rotary_directions(self.angles)
        for block in self.blocks:
            x = block(x, towards)
        logits: Tensor = self.head(self.norm(x))
        return logits.float()

    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        which = [
            zlib.crc32(grid.tobytes()) for grid in codes.cpu().numpy()
        ]  # a grid's numbers are its own
        return self.bound(codes, labels, Numbers(0, which, codes.device).uniform(1 + self.L))

    def bound(self, codes: Tensor, labels: Tensor | None, uniform: Tensor) -> Prediction:
        """An unbiased estimate, by numbers uniform in [0, 1) (B, 1 + L) float64, of what -log p is at most: the mean over
        m = 1 ... L, and over the sets of m codes, of the mean -log p of the m given the others.

        A set comes with what it leaves: L - m is as random as m, and the hard one of the two makes up for the easy one. So
        every code is predicted once, in two runs.
        """
        m = (uniform[:, :1] * self.L).long()
        m = torch.where(m == 0, self.L, m)  # all of them leave nothing
        masked = random_subset(uniform[:, 1:], m)
        logits = torch.where(
            masked[..., None], self(codes, masked, labels), self(codes, ~masked, labels)
        )
        size, sets = torch.where(masked, m, self.L - m), 1 + (m < self.L).long()
        return Prediction(logits, codes, self.L / (size * sets).float())

    def propose(
        self,
        codes: Tensor,
        masked: Tensor,
        places: Tensor,
        uniform: Tensor,
        sampler: Sampler,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Codes (n, r) for the places (n, r), each drawn by itself, its number being that of its place in uniform (n, L),
        and the logits (n, r, K) that they were drawn from."""
        both, guide = double_for_guidance(labels, sampler)
        if guide:
            given, free = self(codes.repeat(2, 1), masked.repeat(2, 1), both).chunk(2)
            logits = guided(
                given, free, sampler.scale(1 - masked[0].count_nonzero().item() / self.L)
            )
        else:
            logits = self(codes, masked, labels)
        logits = logits.gather(1, places[..., None].expand(-1, -1, self.K))
        drawn = sampler.draw(logits.flatten(0, 1), uniform.gather(1, places).flatten())
        return drawn.view_as(places), logits


def random_subset(uniform: Tensor, m: Tensor) -> Tensor:
    """Sets (B, L) bool of m (B, 1) places each, all equally likely, by numbers (B, L)."""
    return uniform.argsort(1).argsort(1) < m
