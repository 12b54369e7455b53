"""A tokenizer as two graphs, images to indices and back, which torch.export traces for any number and size of images."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from vqgan.export.base import Example, serves_any_size
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.lfq import LFQ
from vqgan.tokenizer import Tokenizer

MIN_TRACED_SIDE = 2  # codes: torch.export takes a side of 1 for a constant


class EncoderGraph(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> indices int64 (B, h, w), (B, h, w, num_codebooks), or (B, 1, L) of several scales."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.indices(images)


class DecoderGraph(nn.Module):
    """Indices -> images (B, C, H, W) float32 in [-1, 1]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, indices: Tensor) -> Tensor:
        return self.tokenizer.decode_indices(indices).clamp(-1, 1)


def widen_grid(h: int, w: int) -> tuple[int, int]:
    """A grid to trace with, larger than the tokenizer's so that its sides are no constants, and with sides that differ."""
    return (h + 1, w + 2) if h + 1 != w + 2 else (h + 1, w + 3)


def has_free_sides(tokenizer: Tokenizer) -> bool:
    """Whether the graphs take images of any height and width, not only of the tokenizer's."""
    has_sides = tokenizer.is_gridded and min(tokenizer.grid) >= MIN_TRACED_SIDE
    return has_sides and serves_any_size(tokenizer)


def select_examples(tokenizer: Tokenizer, examples: list[Example]) -> list[Example]:
    """Those that the graphs take; the first is of the tokenizer's size."""
    return examples if has_free_sides(tokenizer) else examples[:1]


def export_graphs(tokenizer: Tokenizer) -> dict[str, ExportedProgram]:
    """The graphs "encoder" and "decoder". Batch, height and width are free, or the batch alone where the networks take one size."""
    still = prepare_for_tracing(tokenizer)
    (h, w), f, free = tokenizer.grid, tokenizer.encoder.f, has_free_sides(tokenizer)
    height, width = tokenizer.encoder.image_size
    if free:
        h, w = widen_grid(h, w)
        height, width = h * f, w * f
    images = torch.zeros(2, tokenizer.encoder.channels, height, width)
    indices = torch.zeros(2, *tokenizer.quantizer.code_shape((h, w)), dtype=torch.int64)
    batch = Dim("batch")
    rows, columns = (Dim(name, min=MIN_TRACED_SIDE) for name in ("rows", "columns"))
    image_sides = {2: f * rows, 3: f * columns} if free else {}
    code_sides = {1: rows, 2: columns} if free else {}
    with torch.no_grad():
        return {
            "encoder": export(
                EncoderGraph(still), (images,), dynamic_shapes={"images": {0: batch, **image_sides}}
            ),
            "decoder": export(
                DecoderGraph(still),
                (indices,),
                dynamic_shapes={"indices": {0: batch, **code_sides}},
            ),
        }


def prepare_for_tracing(tokenizer: Tokenizer) -> Tokenizer:
    """A copy without what only training needs and a graph can't hold: schedules that read a count of updates."""
    still = deepcopy(tokenizer).eval().requires_grad_(False)
    for module in still.modules():
        if isinstance(module, Gumbel):
            module.temperature = 1.0
        if isinstance(module, Codebook | LFQ):
            module.entropy = None
    return still
