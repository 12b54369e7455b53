"""The one contract of every bottleneck: z_e in, `Quantized` out."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.errors import InputError


@dataclass
class Quantized:
    """What a bottleneck makes of z_e (B, dim, h, w).

    z_q (B, dim, h, w) goes to the decoder, its gradient to the encoder; indices are (B, h, w) int64 in [0, K);
    loss is this bottleneck's share of the training loss, a scalar; terms are its parts and alarms, for the log.
    """

    z_e: Tensor
    z_q: Tensor
    indices: Tensor
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """A bottleneck with K codes of width `dim`. `forward` is pure; `start` and `update` are what changes it."""

    def __init__(self, K: int, dim: int) -> None:
        super().__init__()
        if not isinstance(K, int) or K < 2:
            raise InputError(f"quantizer.K={K} must be a whole number of at least 2 codes")
        if not isinstance(dim, int) or dim < 1:
            raise InputError(f"quantizer.dim={dim} must be a whole number of at least 1")
        self.K, self.dim = K, dim

    def forward(self, z_e: Tensor) -> Quantized:
        """z_e (B, dim, h, w) -> z_q (B, dim, h, w), indices (B, h, w)."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) -> z_q (B, dim, h, w), exactly what `forward` gave with these indices."""
        raise NotImplementedError

    def start(self, z: Tensor) -> None:
        """Before the first step: place the codes by encoder outputs z (n, dim), where a bottleneck can."""

    def update(self, q: Quantized) -> None:
        """After the optimizers' step: what moves the codes without gradients, where a bottleneck has such."""


class _StraightThrough(torch.autograd.Function):
    """Forward exactly z_q, backward the gradient of z_q to z_e.

    The usual z_e + (z_q - z_e).detach() rounds: the decoder would train on other vectors than `lookup` returns.
    """

    @staticmethod
    def forward(ctx: Any, z_e: Tensor, z_q: Tensor) -> Tensor:
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q with the gradient copied to z_e (van den Oord et al. 2017, section 3.2; Bengio et al. 2013)."""
    result: Tensor = _StraightThrough.apply(z_e, z_q)
    return result


def nearest(z: Tensor, codebook: Tensor, at_once: int = 2**24) -> Tensor:
    """Index (n,) of the code nearest to each z (n, dim) among codebook (K, dim), the lowest index where two tie.

    Both float32: in bf16, 3-6% of the codes differ. |z|^2 is the same for all codes and left out; at most `at_once`
    distances are held at a time.
    """
    half_norms = codebook.square().sum(1) / 2
    parts = z.split(max(1, at_once // len(codebook)))
    return torch.cat([torch.addmm(half_norms, part, codebook.t(), alpha=-1).argmin(1) for part in parts])


def flatten(z: Tensor) -> Tensor:
    """(B, dim, h, w) -> (B*h*w, dim)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def all_reduce(x: Tensor) -> Tensor:
    """The sum over all ranks, in place; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def from_first_rank(x: Tensor) -> Tensor:
    """The first rank's x on every rank, in place; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(x, 0)
    return x
