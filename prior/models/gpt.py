"""A causal transformer over code grids in raster order."""

from typing import Any

import torch
from torch import Tensor

from prior.decoding.kv_decoder import StepCache
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import Stack


class GPT(Transformer, Autoregressive):
    """Codes in raster order (VQGAN, Esser et al. 2021, section 3.2), with blocks as in Llama: RMSNorm, SwiGLU and 2-D rotary
    positions."""

    stepwise = True
    takes_front = True
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
        return self.predict(codes, labels, *self.places())

    def places(self) -> tuple[Tensor, Tensor]:
        """The position of each step: vectors (T, width), added to what the steps read, and angles for the blocks."""
        return self.place, self.angles

    def predict(
        self, codes: Tensor, labels: Tensor | None, places: Tensor, angles: Tensor
    ) -> Tensor:
        """The logits (B, T, K) of codes (B, T) in any order, whose positions are in `places` and `angles`."""
        x = torch.cat([self.begin(len(codes), labels)[:, None], self.read(codes[:, :-1])], 1)
        return self.logits(self.run_stack(self.blocks, x + places, angles, labels))

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        places, angles = self.places()
        steps = self.start_steps(self.blocks, angles, n, labels, cache)
        first = steps.t

        def decode(before: Tensor | None) -> Tensor:
            x = self.begin(n, labels) if before is None else self.read(before)
            return self.logits(steps(x + places[steps.t - first]))

        return decode
