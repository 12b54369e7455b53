"""Activations that the backward pass computes again, instead of the forward pass keeping them (Chen et al. 2016)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codegrid.engine.errors import InputError


@dataclass(frozen=True)
class Stretch:
    """Neighbouring layers of a chain, from number `start` to before `stop`, of which only the input is kept."""

    chain: nn.Sequential
    start: int
    stop: int

    def __call__(self, x: Tensor) -> Tensor:
        for layer in islice(self.chain, self.start, self.stop):
            x = layer(x)
        return x


class Recomputable(Protocol):
    """A module that names what it trains, and the parts of it whose activations the backward pass may compute again. A part that
    lies in another is computed once more than that one."""

    @property
    def learned(self) -> nn.Module: ...

    @property
    def recomputed(self) -> Sequence[nn.Module | Stretch]: ...


class Recomputation:
    """The forward pass of a module whose backward pass computes activations again: those of the whole module, or, for a chain,
    of one stretch after the other. Inputs are kept, and the states of the random streams, so dropout drops the same again.

    It stands in the module's `forward`, so hooks, names and files of the module stay as they are, and a copy of the module
    computes its own activations again.
    """

    def __init__(self, module: nn.Module, stretches: Sequence[Stretch] = ()) -> None:
        self.module = module
        self.ends = [(stretch.start, stretch.stop) for stretch in stretches]

    def __call__(self, *inputs: Any) -> Any:
        run = partial(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return run(*inputs)
        if not self.ends:
            return checkpoint(run, *inputs, use_reentrant=False)
        assert isinstance(self.module, nn.Sequential)
        [x] = inputs
        for start, stop in self.ends:
            x = checkpoint(Stretch(self.module, start, stop), x, use_reentrant=False)
        return Stretch(self.module, self.ends[-1][1], len(self.module))(x)


def checkpoint_activations(module: Recomputable) -> None:
    """Compute the activations of all parts that a module names again in the backward pass, in place.

    A training step computes these parts twice and keeps their inputs alone; losses and gradients stay as they are. Raises
    InputError for a module without such parts.
    """
    check_recomputed(module.recomputed, module.learned)
    chains: dict[nn.Module, list[Stretch]] = {}
    for part in module.recomputed:
        if isinstance(part, Stretch):
            chains.setdefault(part.chain, []).append(part)
        else:
            part.forward = Recomputation(part)
    for chain, stretches in chains.items():
        chain.forward = Recomputation(chain, stretches)


def check_recomputed(parts: Sequence[nn.Module | Stretch], model: nn.Module) -> None:
    """Raise InputError for a model that names no parts whose activations may be computed again."""
    if not parts:
        raise InputError(
            f"trainer.checkpoint_activations=true computes activations of residual or transformer blocks again, and "
            f"{type(model).__name__} has none; use trainer.checkpoint_activations=false"
        )


def join_neighbours(
    layers: nn.Module, parts: Sequence[nn.Module], light: Iterable[nn.Module], shrinks: bool
) -> list[nn.Module | Stretch]:
    """The parts of a chain together with the other layers of it and those that are `light`, so that the maps in between are kept
    where they are smallest.

    Where a network `shrinks` maps, a layer belongs to the part before it, else to the part after it, and those after the last
    part keep their activations: they go backward first, when all others are still kept. The light parts are computed again by
    themselves, inside of what they belong to. Parts that are not the chain's own layers stay by themselves.
    """
    light = list(light)
    heavy = {id(part) for part in parts} - {id(part) for part in light}
    places = [n for n, layer in enumerate(layers.children()) if id(layer) in heavy]
    if type(layers) is not nn.Sequential or not places or len(places) < len(heavy):
        return list(parts)
    stops = [*places[1:], len(layers)] if shrinks else [n + 1 for n in places]
    return [*light, *(Stretch(layers, start, stop) for start, stop in pairwise([0, *stops]))]
