"""Samples from any prior: of its own grid, of larger grids, and to complete an image."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.compile import check_compile
from codegrid.engine.defaults import read_defaults
from codegrid.engine.errors import InputError
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import AUTO_PARALLEL, Numbers, Sampler
from prior.models.base import PriorModel


def sample(model: PriorModel, sampler: Sampler, n: int, seed: int, **settings: Any) -> Tensor:
    """All batches of `generate` together: n grids of codes (n, h, w) int64, or (n, h, w, num_codebooks), on the model's device.

    Draws in eval mode and restores the model's mode; `settings` are those of `generate`.
    """
    training = model.training
    codes = torch.cat(list(generate(model.eval(), sampler, n, seed, **settings)))
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
    init_codes: Tensor | None = None,
    start: int = 0,
    cache: StepCache | None = None,
) -> Iterator[Tensor]:
    """Yield samples `start` to n - 1 in batches of codes (b, h, w) int64, or (b, h, w, num_codebooks), on the model's device.

    The model must be in eval mode. Sample i depends on the seed and i only, not on the batch size; with a prior of classes
    it is of class labels[i]. The codes `init_codes`, (h, w) or (h, w, num_codebooks) for all samples or (n, ...) for each,
    stay wherever `sampler.known` is true. A grid larger than the prior's own is drawn window by window: see
    `PriorModel.fill_grid`. Of a prior that predicts scales, codes are (1, L), and in batches (b, 1, L).

    A `cache` that is passed counts the forward passes of priors that draw code by code.
    """
    device = next(model.buffers()).device
    grid = sampler.size(model.grid)
    code_shape = model.shape_on(grid)
    empty = torch.zeros(1, *code_shape, dtype=torch.int64, device=device)
    initial = empty if init_codes is None else init_codes.to(device).reshape(-1, *code_shape)
    initial = initial.expand(n, *code_shape)
    cache = StepCache(sampler.compile) if cache is None else cache
    for first in range(start, n, batch_size):
        indices = range(first, min(first + batch_size, n))
        batch_labels = None if labels is None else labels[first : indices.stop].to(device)
        numbers = Numbers(seed, indices, device)
        codes = initial[first : indices.stop].clone()
        known = sampler.known(grid)
        codes = model.fill_grid(codes, known, numbers, sampler, batch_labels, cache)
        yield codes if model.num_codebooks > 1 else codes[..., 0]


def check_sampler_fits(model: PriorModel, sampler: Sampler, kind: str) -> None:
    """Raise InputError for settings that this prior, or this kind of device, doesn't take."""
    check_parallel_sampler(model, sampler)
    check_compile_sampler(model, sampler, kind)
    check_order_sampler(model, sampler)


def check_compile_sampler(model: PriorModel, sampler: Sampler, kind: str) -> None:
    """Raise InputError if `sampler.compile` is on and this prior, or this kind of device, can't be compiled."""
    if sampler.compile and not model.stepwise:
        raise InputError(
            f"sampler.compile=true compiles the steps of prior=gpt, rar and rq, and {type(model).__name__} has none; use "
            "sampler.compile=false"
        )
    check_compile("sampler.compile", sampler.compile, kind)


def check_order_sampler(model: PriorModel, sampler: Sampler) -> None:
    """Raise InputError for settings of priors that fill in masked codes, if this prior is none; conf/'s own order is none."""
    if model.any_order:
        return
    neutral = {
        "order": (None, read_defaults("sampler/default")["order"]),
        "corrector": (0,),
        "remask": (0,),
    }
    for name, values in neutral.items():
        value = getattr(sampler, name)
        if value not in values:
            raise InputError(
                f"sampler.{name}={value} is for priors that fill in masked codes, prior=maskgit and diffusion, and "
                f"{type(model).__name__} has an order of its own; leave sampler.{name} out"
            )


def check_parallel_sampler(model: PriorModel, sampler: Sampler) -> None:
    """Raise InputError if `sampler.parallel` is a number of positions and this prior draws code by code only."""
    if sampler.parallel not in (1, AUTO_PARALLEL) and not model.parallel:
        raise InputError(
            f"sampler.parallel={sampler.parallel} draws many positions in one pass with prior=gpt and rar, prior/head=softmax "
            f"and no codes of another image, and this {type(model).__name__} can't; use sampler.parallel=1, or auto"
        )
