"""Samples from any prior: of its own grid, larger ones, and what is missing of an image."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.compile import check_compile
from engine.errors import InputError
from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import PriorModel


def sample(model: PriorModel, sampler: Sampler, n: int, seed: int, **how: Any) -> Tensor:
    """n grids of codes (n, h, w) int64 on the model's device: those of `batches` together. The model keeps its mode."""
    training = model.training
    codes = torch.cat(list(generate(model.eval(), sampler, n, seed, **how)))
    model.train(training)
    return codes


@torch.no_grad()
def generate(
    model: PriorModel,
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int = 100,
    labels: Tensor | None = None,
    given: Tensor | None = None,
) -> Iterator[Tensor]:
    """n grids of codes, each batch (b, h, w) int64, or (b, h, w, num_codebooks), on the device of the model, which is in eval mode,
    when it is drawn.

    Sample i depends on the seed and i alone, not on the batch size; of a prior with classes it is of the class labels[i].
    Of the codes `given` (h, w) or (h, w, num_codebooks) those that `sampler.known` says stay as they are. A grid larger than the
    prior's is drawn window by window, each given what of it there is already (VQGAN, Esser et al. 2021, section 3.3, in
    strides of half a window instead of one code).
    """
    device = next(model.buffers()).device
    grid = sampler.size(model.grid)
    empty = torch.zeros(1, *grid, model.num_codebooks, dtype=torch.int64, device=device)
    start = empty if given is None else given.to(device).view_as(empty)
    model.kept = {} if sampler.compile else None
    try:
        for first in range(0, n, batch_size):
            which = range(first, min(first + batch_size, n))
            told = None if labels is None else labels[first : which.stop].to(device)
            numbers, codes, known = (
                Numbers(seed, which, device),
                start.repeat(len(which), 1, 1, 1),
                sampler.known(grid),
            )
            for rows, columns in windows(grid, model.grid):
                there = known[rows, columns].flatten().repeat_interleave(model.num_codebooks)
                filled = model.fill(
                    codes[:, rows, columns].flatten(1), there, numbers, sampler, told
                )
                codes[:, rows, columns] = filled.view(-1, *model.grid, model.num_codebooks)
                known[rows, columns] = True
            yield codes if model.num_codebooks > 1 else codes[..., 0]
    finally:
        model.kept = None


def check_compile_sampler(model: PriorModel, sampler: Sampler, kind: str) -> None:
    """Raise InputError where `sampler.compile` wants what can't be compiled, of this prior or for this kind of device."""
    if sampler.compile and not model.stepwise:
        raise InputError(
            f"sampler.compile=true compiles the steps of prior=gpt, rar and rq, and {type(model).__name__} has none such; use "
            "sampler.compile=false"
        )
    check_compile("sampler.compile", sampler.compile, kind)


def windows(grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that cover a grid, in raster order, half a window apart, the last ones at the border."""
    rows, columns = (
        [slice(at, at + part) for at in (*range(0, whole - part, max(part // 2, 1)), whole - part)]
        for whole, part in zip(grid, size, strict=True)
    )
    return [(down, across) for down in rows for across in columns]
