"""What the priors share that fill in masked codes, in any order or many at once."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from prior.decoding.sampling import Numbers, Sampler, guided
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import Prediction, double_for_guidance, draw_all_codes, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import Stack


class Masked(Transformer):
    """A transformer that predicts masked codes from all others, wherever they are.

    Codes drawn one after the other in a random order follow a distribution: the mean of those of all orders. The prior is
    judged by the bound on it of order-agnostic models (Hoogeboom et al. 2022, section 3), which is also the bound of
    absorbing-state diffusion in continuous time (Austin et al. 2021, section 4).
    """

    exact = False
    blocks: Stack

    def __init__(
        self, codebook: Tensor, grid: tuple[int, int], classes: int = 0, **network: Any
    ) -> None:
        """`network` are the TransformerSettings."""
        super().__init__(single_codebook(codebook), grid, classes)
        settings = TransformerSettings(**network)
        self.read = CodeEmbedding(codebook[0], settings.width, settings.inputs)
        self.unread = nn.Parameter(torch.zeros(settings.width))  # read in place of a masked code
        self.label = LabelEmbedding(classes, settings.width)
        self.add_backbone(settings, {"blocks": settings.depth}, causal=False)

    def forward(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, L), of which those `masked` (B, L) are not read, labels (B,) -> logits (B, L, K) float32."""
        x = torch.where(masked[..., None], self.unread, self.read(codes))
        x = x + self.place + self.label(codes.shape[0], labels)[:, None]
        return self.logits(self.blocks(self.drop(x), self.angles))

    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        # A grid's masks depend on its codes only, not on the batch that it comes in.
        seeds = [zlib.crc32(grid.tobytes()) for grid in codes.cpu().numpy()]
        return self.bound(codes, labels, Numbers(0, seeds, codes.device).uniform(1 + self.L))

    def redraw(
        self, codes: Tensor, labels: Tensor | None, uniform: Tensor, sampler: Sampler
    ) -> Tensor:
        """Given a random set of the others, of any size, or given its complement."""
        masks = torch.rand(len(codes), 1 + self.L, device=codes.device)
        return draw_all_codes(self.bound(codes, labels, masks).logits, uniform, sampler)

    def bound(self, codes: Tensor, labels: Tensor | None, uniform: Tensor) -> Prediction:
        """An unbiased estimate of an upper bound on -log p, by numbers (B, 1 + L) float64, uniform in [0, 1).

        The bound is the mean over m = 1 ... L, and over the sets of m codes, of the mean -log p of these m given the others.
        A set is used together with its complement: L - m is distributed as m is, and a hard set is balanced by an easy one.
        So every code is predicted once, in two runs of the network.
        """
        m = (uniform[:, :1] * self.L).long()
        m = torch.where(m == 0, self.L, m)  # the set of all codes has no complement
        masked = random_subset(uniform[:, 1:], m)
        logits = torch.where(
            masked[..., None], self(codes, masked, labels), self(codes, ~masked, labels)
        )
        size = torch.where(masked, m, self.L - m)
        sets = 1 + (m < self.L).long()
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
        """Codes (n, r) for the places (n, r), and the logits (n, r, K) that they were drawn from.

        Each code is drawn independently of the others, by the number of its place in uniform (n, L).
        """
        doubled, guide = double_for_guidance(labels, sampler)
        if guide:
            logits = self(codes.repeat(2, 1), masked.repeat(2, 1), doubled)
            conditional, unconditional = logits.chunk(2)
            drawn_share = 1 - masked[0].count_nonzero().item() / self.L
            logits = guided(conditional, unconditional, sampler.scale(drawn_share))
        else:
            logits = self(codes, masked, labels)
        logits = logits.gather(1, places[..., None].expand(-1, -1, self.K))
        drawn = sampler.draw(logits.flatten(0, 1), uniform.gather(1, places).flatten())
        return drawn.view_as(places), logits


def random_subset(uniform: Tensor, m: Tensor) -> Tensor:
    """Sets (B, L) bool of m (B, 1) places each, all sets equally likely if the numbers (B, L) are random."""
    return uniform.argsort(1).argsort(1) < m
