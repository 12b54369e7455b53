"""Activations that the backward pass computes again, instead of the forward pass keeping them (Chen et al. 2016)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from codegrid.engine.errors import InputError


class Recomputable(Protocol):
    """A module that names the parts whose activations its backward pass may compute again; no part lies in another."""

    @property
    def recomputed(self) -> Sequence[nn.Module]: ...


class Recomputation:
    """The forward pass of a part, of which only the inputs are kept for the backward pass, and the states of the random
    streams: dropout drops the same again.

    It stands in the part's `forward`, so hooks, names and files of the part stay as they are, and a copy of the part
    computes its own activations again.
    """

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, *inputs: Any) -> Any:
        run = partial(type(self.part).forward, self.part)
        if not torch.is_grad_enabled():
            return run(*inputs)
        return checkpoint(run, *inputs, use_reentrant=False)


def checkpoint_activations(module: Recomputable) -> None:
    """Compute the activations of all parts that a module names again in the backward pass, in place.

    A training step computes these parts twice and keeps their inputs alone; losses and gradients stay as they are. Raises
    InputError for a module without such parts.
    """
    if not module.recomputed:
        raise InputError(
            f"trainer.checkpoint_activations=true computes activations of residual or transformer blocks again, and "
            f"{type(module).__name__} has none; use trainer.checkpoint_activations=false"
        )
    for part in module.recomputed:
        part.forward = Recomputation(part)
