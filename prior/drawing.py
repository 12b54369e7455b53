"""Samples from any prior."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prior.models.base import Model
from prior.sampling import Numbers, Sampler


def sample(model: Model, sampler: Sampler, n: int, seed: int, **how: Any) -> Tensor:
    """n grids of codes (n, h, w) int64 on the model's device: those of `batches` together. The model keeps its mode."""
    training = model.training
    codes = torch.cat(list(batches(model.eval(), sampler, n, seed, **how)))
    model.train(training)
    return codes


@torch.no_grad()
def batches(
    model: Model, sampler: Sampler, n: int, seed: int, batch_size: int = 100, labels: Tensor | None = None
) -> Iterator[Tensor]:
    """n grids of codes, each batch (b, h, w) int64, or (b, h, w, books), on the device of the model, which is in eval mode,
    when it is drawn.

    Sample i depends on the seed and i alone, not on the batch size; of a prior with classes it is of the class labels[i].
    """
    device = next(model.buffers()).device
    books = (model.books,) if model.books > 1 else ()
    known = torch.zeros(model.L, dtype=torch.bool)
    for first in range(0, n, batch_size):
        which = range(first, min(first + batch_size, n))
        told = None if labels is None else labels[first : which.stop].to(device)
        empty = torch.zeros(len(which), model.L, dtype=torch.int64, device=device)
        codes = model.fill(empty, known, Numbers(seed, which, device), sampler, told)
        yield codes.view(-1, *model.grid, *books)
