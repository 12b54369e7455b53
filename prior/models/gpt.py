"""A causal transformer over code grids in raster order."""

from typing import Any

import torch
from torch import Tensor

from prior.decoding.kv_decoder import StepCache, make_steps
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import Stack


class GPT(Transformer, Autoregressive):
    """Codes in raster order (VQGAN, Esser et al. 2021, section 3.2), with blocks as in Llama: RMSNorm, SwiGLU and 2-D rotary
    positions."""

    stepwise = True
    blocks: Stack

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        *,
        token_dropout: float,
        **network: Any,
    ) -> None:
        """`network` are the TransformerSettings."""
        super().__init__(single_codebook(codebook), grid, classes, token_dropout)
        settings = TransformerSettings(**network)
        self.read = CodeEmbedding(codebook[0], settings.width, settings.inputs)
        # The first step reads this vector in place of a code.
        self.begin = LabelEmbedding(classes, settings.width)
        self.add_backbone(settings, {"blocks": settings.depth})

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head.logits(self.features(codes, labels))

    def features(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.run_blocks(codes, labels, *self.places())

    def places(self) -> tuple[Tensor, Tensor]:
        """The position of each step: vectors (T, width), added to what the steps read, and angles for the blocks."""
        return self.place, self.angles

    def run_blocks(
        self, codes: Tensor, labels: Tensor | None, places: Tensor, angles: Tensor
    ) -> Tensor:
        """The features (B, T, width) of codes (B, T) in any order, whose positions are in `places` and `angles`."""
        x = torch.cat([self.begin(len(codes), labels)[:, None], self.read(codes[:, :-1])], 1)
        features: Tensor = self.norm(self.blocks(self.drop(x + places), angles))
        return features

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        step = self.feature_decoder(n, labels, cache)
        return lambda before: self.head.logits(step(before))

    def feature_decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        places, angles = self.places()
        steps = make_steps(self.blocks, angles, n, cache)

        def decode(before: Tensor | None) -> Tensor:
            x = self.begin(n, labels) if before is None else self.read(before)
            features: Tensor = self.norm(steps(x + places[steps.t]))
            return features

        return decode
