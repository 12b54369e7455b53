"""The one contract of every bottleneck: z_e in, `Quantized` out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import broadcast
from engine.errors import InputError, check_int


@dataclass
class Quantized:
    """What a bottleneck makes of the encoder's output.

    z_e (B, dim, h, w) is what was compared with the codes; z_q (B, dim, h, w) goes to the decoder, its gradient to the
    encoder; indices are (B, h, w) int64 in [0, K), (B, h, w, q) where there are q codebooks, None where there are no
    codes; loss is this bottleneck's share of the training loss, a scalar; terms are its parts and alarms, for the log;
    parts are what the bottlenecks inside this one made, where it is made of others.
    """

    z_e: Tensor
    z_q: Tensor
    indices: Tensor | None
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    parts: list["Quantized"] = field(default_factory=list)


def join_micro_batches(made: list[Quantized]) -> Quantized:
    """What a bottleneck made of the micro-batches of one update, as if of one batch: all that `update` looks at.

    Where dropout left inner bottlenecks out of a micro-batch, theirs are of the others alone.
    """
    if len(made) == 1:
        return made[0]
    z_e, z_q = torch.cat([q.z_e for q in made]), torch.cat([q.z_q for q in made])
    indices = [q.indices for q in made if q.indices is not None]
    deepest = max(len(q.parts) for q in made)
    parts = [
        join_micro_batches([q.parts[i] for q in made if len(q.parts) > i]) for i in range(deepest)
    ]
    return Quantized(z_e, z_q, torch.cat(indices) if indices else None, made[0].loss, parts=parts)


NO_CODES = "this tokenizer is continuous (quantizer=none or kl) and has no codes; train one with quantizer=ema"


class Quantizer(nn.Module, ABC):
    """A bottleneck of width `dim`. `forward` is pure; `start` and `update` are what changes it.

    K is the number of codes in a codebook, None for a continuous bottleneck; `num_codebooks` is how many codebooks each
    position of the grid is told by; `in_dim` is how many channels it wants of the encoder.
    """

    updates: Tensor

    def __init__(
        self, K: int | None, dim: int, num_codebooks: int = 1, in_dim: int | None = None
    ) -> None:
        super().__init__()
        if K is not None:
            check_int("quantizer.K", K, 2, "codes")
        check_int("quantizer.dim", dim, 1)
        self.K, self.dim, self.num_codebooks, self.in_dim = K, dim, num_codebooks, in_dim or dim
        self.register_buffer(
            "updates", torch.zeros((), dtype=torch.int64)
        )  # what this bottleneck's schedules follow

    @property
    def bits(self) -> float:
        """Bits that a position of the grid takes: num_codebooks * log2 K; nan for a continuous bottleneck."""
        return self.num_codebooks * math.log2(self.K) if self.K else math.nan

    @abstractmethod
    def forward(self, z_e: Tensor) -> Quantized:
        """z_e (B, in_dim, h, w) -> z_q (B, dim, h, w), indices (B, h, w) or (B, h, w, num_codebooks)."""

    def lookup(self, indices: Tensor) -> Tensor:
        """indices as `forward` gives them -> z_q (B, dim, h, w), in eval mode exactly what `forward` gave with them."""
        raise InputError(NO_CODES)

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """What each code stands for, (num_codebooks, K, width of a codebook), on the CPU; without grid and projection around it."""
        if self.K is None:
            raise InputError(NO_CODES)
        everyone = torch.arange(self.K, device=self.updates.device)
        return self.lookup(everyone[:, None, None])[None, :, :, 0, 0].cpu()

    def draw(self, n: int, grid: tuple[int, int], seed: int) -> Tensor:
        """z_q (n, dim, h, w) from the distribution that training brought it towards, where a bottleneck has one."""
        raise InputError(
            "only a tokenizer with quantizer=kl can be drawn from directly; learn the codes of another first, with stage=prior "
            "ckpt=<its run folder>, and give stage=sample that prior"
        )

    def start(self, z: Tensor) -> None:
        """Before the first step: meet encoder outputs z (n, in_dim), and place the codes by them where there are any."""

    def update(self, q: Quantized, rate: float = 1.0) -> None:
        """After the optimizers' step, at `rate` times the peak learning rate: count it, and move what moves without gradients."""
        self.updates += 1

    def parameter_rates(self) -> dict[nn.Parameter, float]:
        """Parameters that learn at a rate of their own: theirs as a multiple of the optimizer's."""
        return {}


class Standardised(Quantizer):
    """A bottleneck whose codes or noise have a fixed scale: the encoder's output is brought to it, the decoder's from it.

    `start` sets the mean and the spread of each channel once, so that a bottleneck of unit scale fits an encoder of any.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, K: int | None, dim: int, in_dim: int | None = None) -> None:
        super().__init__(K, dim, in_dim=in_dim)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        z = z[:, : self.dim].float()
        self.centre.copy_(broadcast(z.mean(0)))
        self.spread.copy_(broadcast(z.std(0).clamp(min=1e-4)))

    def standard(self, z: Tensor) -> Tensor:
        """(B, dim, h, w) of the encoder -> about unit scale."""
        return (z - self.centre[:, None, None]) / self.spread[:, None, None]

    def original(self, z: Tensor) -> Tensor:
        """The inverse of `standard`."""
        return z * self.spread[:, None, None] + self.centre[:, None, None]


class Anneal:
    """A value that goes from `first` to `last` over so many `updates`, in equal ratios where both are above 0."""

    def __init__(self, first: float, last: float, updates: int) -> None:
        if min(first, last) < 0 or updates < 0:
            raise InputError(
                f"an annealed value from {first} to {last} over {updates} updates must have no part below 0"
            )
        self.first, self.last, self.updates = first, last, updates

    def __call__(self, update: int) -> float:
        share = min(1.0, update / self.updates) if self.updates else 1.0
        if self.first > 0 and self.last > 0:
            return self.first * (self.last / self.first) ** share
        return self.first + (self.last - self.first) * share


Function = TypeVar("Function", bound=Callable[..., Any])


def float32(function: Function) -> Function:
    """A function that autocast leaves alone. In bf16, 3-6% of the codes differ."""
    for kind in ("cpu", "cuda"):
        function = torch.autocast(kind, enabled=False)(function)
    return function


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


class _Rotation(torch.autograd.Function):
    """Forward exactly z_q, backward the gradient through the rotation and scaling that takes each z_e to its z_q."""

    @staticmethod
    def forward(ctx: Any, z_e: Tensor, z_q: Tensor) -> Tensor:
        ctx.save_for_backward(z_e, z_q)
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z_e, z_q), g = ctx.saved_tensors, gradients[0]
        norm_e, norm_q = (z.norm(dim=1, keepdim=True) for z in (z_e, z_q))
        tiny = torch.finfo(z_e.dtype).tiny
        e, q = z_e / norm_e.clamp(min=tiny), z_q / norm_q.clamp(min=tiny)
        r = e + q
        square = r.square().sum(1, keepdim=True)
        # The transpose of R = I - 2 r r^T / |r|^2 + 2 q e^T, applied to g.
        turned = (
            g
            - 2 * r * (r * g).sum(1, keepdim=True) / square.clamp(min=tiny)
            + 2 * e * (q * g).sum(1, keepdim=True)
        )
        defined = (
            (norm_e > 1e-6) & (norm_q > 1e-6) & (square > 1e-6)
        )  # no direction, or opposite ones: copy the gradient
        return torch.where(defined, turned * norm_q / norm_e.clamp(min=1e-6), g), None


def rotate(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q (B, dim, ...) with the gradient turned and scaled as z_e is to become z_q (Fifty et al. 2024, section 4.2).

    z_q = |z_q|/|z_e| R z_e with the rotation R held constant. Where a vector is zero or both are opposite, R does not
    exist and the gradient is copied.
    """
    result: Tensor = _Rotation.apply(z_e, z_q)
    return result


def nearest(
    z: Tensor, codebook: Tensor, at_once: int = 2**21, columns: int = 2048, group: int = 32
) -> Tensor:
    """Index (n,) of the code nearest to each z (n, dim) among codebook (K, dim), the lowest index where two tie.

    Both float32: in bf16, 3-6% of the codes differ. The nearest code has the largest score z . e - |e|^2 / 2. At most
    `at_once` scores, 8 MiB, of at most `columns` codes are held at a time. A plain maximum runs at the speed of memory and
    one that remembers its place does not, so the best of each `group` codes is found first, and then its place among
    the winning group.
    """
    K, half_norms = len(codebook), codebook.square().sum(1) / 2
    columns = min(columns, -(-K // group) * group)
    if short := -K % columns:
        codebook, half_norms = (
            F.pad(codebook, (0, 0, 0, short)),
            F.pad(half_norms, (0, short), value=math.inf),
        )
    tiles = [
        (-half, codes.t())
        for half, codes in zip(half_norms.split(columns), codebook.split(columns), strict=True)
    ]
    found = []
    for part in z.split(max(1, at_once // columns)):
        each = torch.arange(len(part), device=z.device)
        for i, (bias, codes) in enumerate(tiles):
            scores = torch.addmm(bias, part, codes).view(len(part), -1, group)
            top, winner = scores.amax(2).max(1)
            index = i * columns + winner * group + scores[each, winner].argmax(1)
            if i == 0:
                best, indices = top, index
            else:
                better = top > best
                best, indices = torch.where(better, top, best), torch.where(better, index, indices)
        found.append(indices)
    return torch.cat(found)


def flatten(z: Tensor) -> Tensor:
    """(B, dim, h, w) -> (B*h*w, dim)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """(B*h*w, dim) -> (B, dim, h, w) with B, h and w of `like`; in memory each vector stays together."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).movedim(-1, 1)
