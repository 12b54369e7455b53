"""A causal transformer over code grids in raster order."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.decoding.kv_decoder import KVSteps, Multiply, StepCache, pack_head, product_dtype
from prior.decoding.parallel import Windows, choose_pace
from prior.decoding.sampling import AUTO_PARALLEL, GumbelNoise, Numbers, Sampler
from prior.heads.softmax import Softmax
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import (
    Autoregressive,
    Draw,
    StepDecoder,
    double_for_guidance,
    single_codebook,
)
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

    @property
    def parallel(self) -> bool:
        """Windows begin with a prior's own codes, and draw from logits, which other heads compute from all codes' digits."""
        return isinstance(self.head, Softmax) and self.front is None

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
        features: Tensor = self.norm(self.run_stack(self.blocks, x + places, angles, labels))
        return features

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        return self.begin_steps(n, labels, cache, *self.pack_ends(n, cache))

    def feature_decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        return self.begin_steps(n, labels, cache, self.read, self.norm)

    def begin_steps(
        self,
        n: int,
        labels: Tensor | None,
        cache: StepCache | None,
        read: Multiply,
        predict: Multiply,
    ) -> StepDecoder:
        """Steps that read the code before by `read` and return what `predict` makes of the last block's output."""
        places, angles = self.places()
        steps = self.start_steps(self.blocks, angles, n, labels, cache)
        first = steps.t

        def decode(before: Tensor | None) -> Tensor:
            x = self.begin(n, labels) if before is None else read(before)
            return predict(steps(x + places[steps.t - first]))

        return decode

    def pack_ends(self, n: int, cache: StepCache | None) -> tuple[Multiply, Multiply]:
        """Functions that read codes and that predict logits, as `read` and `logits` do, laid out to draw n samples."""
        cache = StepCache() if cache is None else cache
        read: Multiply = self.read
        if n * self.T >= self.K:  # or the table would have vectors that nobody reads
            table = cache.pack(self.read, self.read.tabulate)
            read = partial(F.embedding, weight=table)
        head = self.head
        if not isinstance(head, Softmax):
            return read, self.logits
        return read, cache.pack(head, lambda: pack_head(self.norm, head))

    def start_draws(self, numbers: Numbers, sampler: Sampler, directly: bool) -> Draw:
        if sampler.parallel == 1 or not self.parallel:
            return super().start_draws(numbers, sampler, directly)
        noise = GumbelNoise(numbers.fork(), self.T, self.K, 1, self.place.device)
        n = len(noise.streams)
        return lambda logits, t: sampler.draw_coupled(logits, noise.at([t] * n, 1)[:, 0])

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        if not self.parallel:
            return super().fill(codes, known, numbers, sampler, labels, cache)
        doubled, is_guided = double_for_guidance(labels, sampler)
        n, device = len(codes) * (1 + is_guided), codes.device
        pace = choose_pace(sampler, n, self.grid, device, product_dtype(device))
        if pace.window == 1 or sampler.steps:  # which is refused there
            if (
                sampler.parallel == AUTO_PARALLEL
            ):  # without the noise of all K codes, which costs time
                sampler = replace(sampler, parallel=1)
            return super().fill(codes, known, numbers, sampler, labels, cache)
        cache = StepCache() if cache is None else cache
        decode = GPTWindows(self, n, doubled, cache, pace.window)
        noise = GumbelNoise(numbers.fork(), self.T, self.K, 2 * pace.window, device)
        windows = Windows(decode, codes, known, noise, sampler, is_guided, pace)
        filled = windows.fill()
        cache.passes += windows.passes
        return filled


class GPTWindows:
    """The logits of windows of positions (prior/decoding/parallel.py)."""

    def __init__(
        self, model: GPT, n: int, labels: Tensor | None, cache: StepCache, window: int
    ) -> None:
        places, angles = model.places()
        self.places = F.pad(places, (0, 0, 0, window))
        self.blocks, self.angles = model.blocks, angles
        self.windows = cache.windows(model.blocks, angles, n, window)
        self.read, self.predict = model.pack_ends(n, cache)
        self.start = model.begin(n, labels) + places[0]

    def __call__(self, before: Tensor, first: Tensor, end: int) -> Tensor:
        n, W = before.shape
        x = self.read(before) + self.places[first[:, None] + torch.arange(W, device=first.device)]
        if end == W:  # all are at their first position
            x[:, 0] = self.start
        return self.predict(self.windows(x, first, end).flatten(0, 1)).view(n, W, -1)

    def select(self, samples: Tensor) -> None:
        self.windows.select(samples)

    def begin_steps(self, t: int) -> Callable[[Tensor | None], Tensor]:
        packed, n = self.windows.packed, self.windows.cache.n
        self.steps = steps = KVSteps(self.blocks, self.angles, n, packed)
        steps.go_on(self.windows.cache, t)

        def decode(before: Tensor | None) -> Tensor:
            x = self.start if before is None else self.read(before) + self.places[steps.t]
            return self.predict(steps(x))

        return decode

    def end_steps(self) -> None:
        self.windows.go_on(self.steps.cache, self.steps.t)
