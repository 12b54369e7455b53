"""A transformer over grids of growing sizes, which predicts all codes of a scale at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_range
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler, guided
from prior.heads.base import Head
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import (
    Prediction,
    Predictions,
    double_for_guidance,
    predict_all,
    replace_randomly,
)
from prior.models.inputs import LabelEmbedding
from prior.models.transformer import Past, Stack, rotary_at
from prior.orders import windows
from vqgan.quantizers.scales import Scales


class MapEmbedding(nn.Module):
    """The map that the codes of the scales so far add up to, shrunk to the next scale and projected to the prior's width."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, scales: Scales, width: int) -> None:
        """vectors (1 or scales, K, dim) of the tokenizer's codes, and its scales, of which this takes a copy without gradients."""
        super().__init__()
        self.register_buffer("vectors", vectors.detach().clone().float())
        self.scales = scales.frozen()
        self.read = nn.Linear(vectors.shape[-1], width)
        # As CodeEmbedding: outputs of a length of about 1 per channel, whatever that of the vectors.
        length = self.vectors.square().sum(-1).mean().sqrt().clamp(min=1e-3)
        nn.init.normal_(self.read.weight, std=1 / float(length))
        nn.init.zeros_(self.read.bias)

    def add(self, z_hat: Tensor, codes: Tensor, scale: int) -> Tensor:
        """z_hat (B, dim, h, w) with the codes (B, rows, columns) of a scale added."""
        table = self.vectors[scale if len(self.vectors) > 1 else 0]
        return self.scales.add(z_hat, table[codes].movedim(-1, 1), scale)

    def start(self, n: int, grid: tuple[int, int]) -> Tensor:
        """z_hat (n, dim, *grid) before the first scale."""
        return self.vectors.new_zeros(n, self.vectors.shape[-1], *grid)

    def forward(self, z_hat: Tensor, size: tuple[int, int]) -> Tensor:
        """z_hat (B, dim, h, w) -> what the codes of a scale are predicted from, (B, rows * columns, width)."""
        embedded: Tensor = self.read(self.scales.shrink(z_hat, size).flatten(2).mT)
        return embedded


class VAR(Transformer):
    """Next-scale prediction (Tian et al. 2024, VAR, section 3.1): p(codes of a scale | all codes of the scales before it).

    The codes of one scale are independent given those before, so each scale is drawn in one pass. Each position reads the map of
    the scales before its own, and attends to the positions of its own scale and of those before. The likelihood is exact: for
    codes in this order it is a product of conditional probabilities. Unlike in the paper, labels are added to the inputs, and
    positions are rotary in the coordinates of the last grid, with a vector for each besides.

    Codes are one row (B, L), the grids of `scales` one after the other.
    """

    blocks: Stack
    mask: Tensor

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        *,
        scales: Scales,
        token_dropout: float,
        **network: Any,
    ) -> None:
        """codebook (1 or scales, K, dim); `scales` are those of the tokenizer, `network` the TransformerSettings but inputs."""
        super().__init__(codebook, grid, classes)
        check_range("prior.token_dropout", token_dropout, 0, 1)
        if scales.sizes[-1] != self.grid or len(codebook) not in (1, len(scales.sizes)):
            raise InputError(
                f"the {len(codebook)} codebooks and the grid {self.grid} are not those of scales {list(scales.sizes)}"
            )
        self.token_dropout = token_dropout
        self.num_codebooks = 1
        self.sizes, lengths = scales.sizes, scales.lengths()
        self.L = self.T = sum(lengths)
        self.spans = [slice(sum(lengths[:k]), sum(lengths[: k + 1])) for k in range(len(lengths))]
        settings = TransformerSettings(inputs="codes", **network)
        self.read = MapEmbedding(codebook, scales, settings.width)
        self.begin = LabelEmbedding(classes, settings.width)
        self.add_backbone(settings, {"blocks": settings.depth}, causal=False)
        scale = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = torch.zeros(self.L, self.L).masked_fill(scale[:, None] < scale, -torch.inf)
        self.register_buffer("mask", mask, persistent=False)

    def derive_buffers(self) -> None:
        super().derive_buffers()
        self.read.scales.derive_buffers()

    def make_angles(self, size: int) -> Tensor:
        """Of the middles of all cells, in the coordinates of the last grid."""
        angles = []
        for scale in self.sizes:
            rows, columns = (
                (torch.arange(n) + 0.5) * (side / n) - 0.5
                for n, side in zip(scale, self.grid, strict=True)
            )
            angles.append(rotary_at(rows, columns, size))
        return torch.cat(angles)

    def make_head(self, settings: TransformerSettings) -> Head:
        return settings.head(settings.width, self.read.vectors[0])

    @property
    def ends(self) -> list[nn.Module]:
        return [self.read, self.head]

    def shape_on(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        return 1, sum(self.read.scales.lengths(grid)), 1

    def map_nats(self, nats: Tensor) -> Tensor:
        """The mean over the scales of the value of each place's code."""
        maps = []
        for size, span in zip(self.sizes, self.spans, strict=True):
            own = nats[..., span].unflatten(-1, size)
            for axis, n, side in zip((-2, -1), size, self.grid, strict=True):
                places = torch.arange(side, device=nats.device) * n // side
                own = own.index_select(axis, places)
            maps.append(own)
        return torch.stack(maps).mean(0)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, L), labels (B,) -> logits (B, L, K) float32; those of a scale depend on the label and the scales before."""
        return self.head.logits(self.features(codes, labels))

    def features(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `forward`, what the head reads (B, L, width)."""
        n = codes.shape[0]
        z_hat = self.read.start(n, self.grid)
        maps: list[Tensor] = []
        for k, (size, span) in enumerate(zip(self.sizes, self.spans, strict=True)):
            maps.append(self.embed(z_hat, k, labels))
            if k + 1 < len(self.sizes):
                z_hat = self.read.add(z_hat, codes[:, span].unflatten(1, size), k)
        x = self.drop(torch.cat(maps, 1))
        features: Tensor = self.norm(self.blocks(x, self.angles, self.mask))
        return features

    def embed(self, z_hat: Tensor, scale: int, labels: Tensor | None) -> Tensor:
        """What the positions of a scale read: the map of the scales before, the label, and where they are."""
        x = self.begin(z_hat.shape[0], labels)[:, None] + self.place[self.spans[scale]]
        # Before the first scale the map is empty.
        return x + self.read(z_hat, self.sizes[scale]) if scale else x

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        read = replace_randomly(codes, self.K, self.token_dropout)
        return predict_all(self.features(read, labels), codes, self.readout)

    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        return predict_all(self.features(codes, labels), codes, self.readout)

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Scale by scale, each in one pass over its own positions: keys and values of those before are kept."""
        self.check_steps(sampler)
        codes = codes.clone()
        uniform = numbers.uniform(self.L)
        is_known = known.tolist()
        doubled, guide = double_for_guidance(labels, sampler)
        predictions = self.predict_in_turn(len(codes), doubled, guide)
        last = max((t for t in range(self.L) if not is_known[t]), default=-1)
        before = slice(0)
        for span in self.spans:
            if span.start > last:
                break
            logits = predictions.send(codes[:, before]) if span.start else next(predictions)
            drawn = self.draw(logits, uniform[:, span], sampler, guide, span.start / self.L)
            codes[:, span] = torch.where(known[span].to(codes.device), codes[:, span], drawn)
            places = [t for t in range(span.start, span.stop) if not is_known[t]]
            if places and cache is not None and cache.watch is not None:
                cache.watch(torch.tensor(places), codes[:, places])
            before = span
        return codes

    def predict_in_turn(self, n: int, labels: Tensor | None, guide: bool = False) -> Predictions:
        """Scale by scale. With `guide`, labels and logits are those of 2n, as for `guided`."""
        pasts = [Past() for _ in self.blocks]
        z_hat = self.read.start(n, self.grid)
        for k, (size, span) in enumerate(zip(self.sizes, self.spans, strict=True)):
            x = self.embed(z_hat.repeat(2, 1, 1, 1) if guide else z_hat, k, labels)
            codes = yield self.logits(self.blocks(x, self.angles[span], pasts=pasts))
            if k + 1 < len(self.sizes):
                z_hat = self.read.add(z_hat, codes.unflatten(1, size), k)

    def fill_grid(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """A code is redrawn if it has no part of what is `known`.

        A larger grid has larger scales, in which a code covers as large a part of the image as in training. Each scale is drawn in
        windows of the size of the prior's own, half of one apart, which read the map of the scales before in their own part.
        """
        row = codes.flatten(1)
        grid = (known.shape[0], known.shape[1])
        if grid == self.grid:
            touched = [part.flatten() for part in self.read.scales.touched(known)]
            filled = self.fill(row, torch.cat(touched), numbers, sampler, labels, cache)
            return filled.view_as(codes)
        return self.fill_windows(len(row), grid, numbers, sampler, labels).view_as(codes)

    def fill_windows(
        self,
        n: int,
        grid: tuple[int, int],
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
    ) -> Tensor:
        """Codes (n, L of the grid) of pictures with this grid, which is at least the prior's own, as `fill_grid` says."""
        self.check_steps(sampler)
        length = sum(self.read.scales.lengths(grid))
        uniform = self.read.scales.split(numbers.uniform(length), grid)
        z_hats = [self.read.start(n, grid)]
        drawn: list[Tensor] = []
        for k, size in enumerate(self.read.scales.sizes_on(grid)):
            own = torch.full((n, *size), -1, dtype=torch.int64, device=z_hats[0].device)
            for rows, columns in windows(size, self.sizes[k]):
                corner = [
                    place_window(
                        cells.start, side, self.sizes[k][axis], grid[axis], self.grid[axis]
                    )
                    for axis, (cells, side) in enumerate(zip((rows, columns), size, strict=True))
                ]
                logits, guide = self.predict_window(z_hats, corner, sampler, labels)
                luck = uniform[k][:, rows, columns].flatten(1)
                share = self.spans[k].start / self.L
                fresh = self.draw(logits, luck, sampler, guide, share)
                window = own[:, rows, columns]
                fresh = fresh.view_as(window)
                own[:, rows, columns] = torch.where(window < 0, fresh, window)
            drawn.append(own.flatten(1))
            z_hats.append(self.read.add(z_hats[-1], own, k))
        return torch.cat(drawn, 1)

    def predict_window(
        self,
        z_hats: Sequence[Tensor],
        corner: Sequence[int],
        sampler: Sampler,
        labels: Tensor | None,
    ) -> tuple[Tensor, bool]:
        """The logits of the next scale in a window of the prior's grid, whose upper left place is `corner`, and whether they are
        there twice for guidance. z_hats are the maps of a larger grid before each scale so far."""
        doubled, guide = double_for_guidance(labels, sampler)
        (top, left), (h, w) = corner, self.grid
        maps: list[Tensor] = []
        for k, z_hat in enumerate(z_hats):
            window = z_hat[:, :, top : top + h, left : left + w]
            maps.append(self.embed(window.repeat(2, 1, 1, 1) if guide else window, k, doubled))
        x, span = torch.cat(maps, 1), self.spans[len(z_hats) - 1]
        n = span.stop
        y = self.blocks(x, self.angles[:n], self.mask[:n, :n])
        return self.logits(y[:, span]), guide

    def draw(
        self, logits: Tensor, uniform: Tensor, sampler: Sampler, guide: bool, drawn_share: float
    ) -> Tensor:
        """Codes (n, m) for the logits (n, m, K) of positions, or (2n, m, K) for guidance, by numbers (n, m)."""
        if guide:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, sampler.scale(drawn_share))
        drawn = self.head.draw_from_logits(logits.flatten(0, 1), uniform.flatten(), sampler)
        return drawn.view_as(uniform)

    def check_steps(self, sampler: Sampler) -> None:
        """Raise InputError for a number of steps that is not that of the scales."""
        if sampler.steps not in (0, len(self.sizes)):
            raise InputError(
                f"sampler.steps={sampler.steps}: this prior draws its {len(self.sizes)} scales in one step each; "
                "use sampler.steps=0"
            )


def place_window(start: int, n: int, size: int, whole: int, part: int) -> int:
    """Where a window begins among the `whole` places of a side, of which it has `part`, if it begins at cell `start` of the n of
    a scale, of which it has `size`."""
    return round(start * (whole - part) / (n - size)) if n > size else 0
