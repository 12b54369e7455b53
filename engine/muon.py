"""Muon: matrices follow their orthogonalised gradients, all other parameters AdamW, in one optimizer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.fsdp import full_tensor, shard_like
from codegrid.engine.precision import without_autocast

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5: steep at 0, near 1 elsewhere
LEAST_NORM = 1e-7  # the least norm that a matrix is divided by
MIN_MATRIX_SIDE = 16  # rows and columns of what counts as a matrix
DTYPES = ("auto", "float32", "bfloat16")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)  # whose weights are matrices
GRAM_PAYS = 1.5  # columns per row from which products of the small Gram matrices cost less


@dataclass(frozen=True, kw_only=True)
class Muon:
    """The settings of Muon for matrices and AdamW for all else; calling them with parameter groups builds the optimizer.

    lr, betas, eps, weight_decay, fused      AdamW's
    matrix_lr       learning rate of the matrices, times sqrt(max(1, rows / columns))
    matrix_decay    their weight decay, per update and unit of matrix_lr
    momentum        of their gradients, Nesterov's
    iterations      of Newton-Schulz per update
    dtype           of the iterations: float32, bfloat16, or auto
    ends            whether the first and last layers are matrices as well
    """

    lr: float
    betas: Sequence[float]
    eps: float
    weight_decay: float
    fused: bool
    matrix_lr: float
    matrix_decay: float
    momentum: float
    iterations: int
    dtype: str
    ends: bool

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "matrix_lr", "matrix_decay"):
            check_range(f"optimizer.{name}", getattr(self, name), 0)
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise InputError(f"optimizer.betas={self.betas} must be two numbers, as [0.9, 0.99]")
        for name, value in (*(("betas", beta) for beta in self.betas), ("momentum", self.momentum)):
            check_range(f"optimizer.{name}", value, 0, 1)
            if value == 1:
                raise InputError(f"optimizer.{name}={value} must be below 1, or nothing is learned")
        check_int("optimizer.iterations", self.iterations, 1)
        if self.dtype not in DTYPES:
            raise InputError(f"optimizer.dtype={self.dtype} must be one of {', '.join(DTYPES)}")
        for name in ("fused", "ends"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"optimizer.{name}={getattr(self, name)} must be true or false")

    def __call__(self, groups: Iterable[dict[str, Any]]) -> "MuonOptimizer":
        return MuonOptimizer(groups, self)

    def choose_matrices(
        self, module: nn.Module, ends: Iterable[nn.Module] = ()
    ) -> set[nn.Parameter]:
        """The weights of linear maps, convolutions and recurrences with at least 16 rows and 16 columns.

        Left out are embeddings, the parts `ends` unless the setting of that name is on, since rows or columns of these are
        codes, classes or channels of the image (Jordan et al. 2024), and weights that are computed from others, as under
        spectral normalisation or LoRA.
        """
        excluded = {id(p) for end in ends for p in end.parameters() if not self.ends}
        return {
            p
            for part in module.modules()
            if isinstance(part, LAYERS)
            for name, p in part.named_parameters(recurse=False)
            if name.startswith("weight") and p.ndim > 1 and id(p) not in excluded
            if min(len(p), math.prod(p.shape[1:])) >= MIN_MATRIX_SIDE
        }


class MuonOptimizer(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations, for groups with matrix=True (Jordan et al. 2024), with decoupled
    weight decay (Liu et al. 2025, eq. 2-3); AdamW (Loshchilov & Hutter 2019) for all other groups.

    m <- momentum * m + (1 - momentum) * g;  W <- (1 - lr * decay) W - lr * sqrt(max(1, rows / columns)) * orthogonalise(n),
    n = momentum * m + (1 - momentum) * g. A convolution is a matrix of its output channels by all else.

    Ranks that hold shards gather the steps of one shape at a time; all ranks orthogonalise the same, so they stay equal.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], settings: Muon) -> None:
        matrix = {
            "lr": settings.matrix_lr,
            "weight_decay": settings.matrix_decay,
            "momentum": settings.momentum,
            "iterations": settings.iterations,
            "dtype": settings.dtype,
        }
        other = {
            "lr": settings.lr,
            "betas": tuple(settings.betas),
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "fused": settings.fused,
        }
        described = [
            {"matrix": False, **(matrix if group.get("matrix") else other), **group}
            for group in groups
        ]
        super().__init__(described, {})
        for group in self.param_groups:
            for p in group["params"]:
                assert not group["matrix"] or p.ndim > 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` does, which is called before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if learning:
                update = self._update_matrices if group["matrix"] else self._update_others
                update(group, learning)
        return loss

    def _update_matrices(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        steps = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for numbers in group_by_shape(matrices):  # so that no more than these are gathered at once
            whole = [full_tensor(steps[n]).flatten(1) for n in numbers]
            directions = orthogonalise_alike(whole, group["iterations"], group["dtype"])
            for n, direction in zip(numbers, directions, strict=True):
                p, (rows, columns) = matrices[n], direction.shape
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                p.add_(shard_like(direction.to(p.dtype).view(p.shape), p), alpha=-rate)

    def _update_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"
                self.state[p] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def group_by_shape(matrices: Iterable[Tensor]) -> list[list[int]]:
    """The numbers of the matrices, together where rows and columns are the same or exchanged."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, x in enumerate(matrices):
        sides = len(x), math.prod(x.shape[1:])
        groups.setdefault((min(sides), max(sides)), []).append(n)
    return list(groups.values())


def orthogonalise_alike(
    matrices: Sequence[Tensor], iterations: int, dtype: str = "auto"
) -> list[Tensor]:
    """Each matrix orthogonalised, all at once; they have one shape, or its transpose."""
    is_tall = [x.shape[0] > x.shape[1] for x in matrices]
    wide = [x.mT if tall else x for x, tall in zip(matrices, is_tall, strict=True)]
    done = orthogonalise(torch.stack(wide), iterations, dtype)
    return [x.mT.contiguous() if tall else x for x, tall in zip(done, is_tall, strict=True)]


def orthogonalise(x: Tensor, iterations: int, dtype: str = "auto") -> Tensor:
    """x (n, rows, columns), rows <= columns -> about U V^T of each U S V^T: singular values come near 1, those of more than
    about 0.01 of the Frobenius norm to 0.7-1.2 after 5 iterations.

    With dtype="auto", a GPU computes it in bfloat16, which is accurate enough (Jordan et al. 2024), and a CPU in float32; under
    autocast too.
    """
    with without_autocast(x.device):
        x = x.float()
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)
        if dtype == "bfloat16" or (dtype == "auto" and x.is_cuda):
            return iterate(x.bfloat16(), iterations)
        rows, columns = x.shape[1:]
        pays = columns >= GRAM_PAYS * rows
        return iterate_by_gram(x, iterations) if pays else iterate(x, iterations)


def iterate(x: Tensor, iterations: int) -> Tensor:
    """x <- (a I + b A + c A^2) x, A = x x^T, several times."""
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterate_by_gram(x: Tensor, iterations: int) -> Tensor:
    """The same as `iterate` for float32, with products of (rows, rows) between the first and the last.

    P = a I + b A + c A^2 is a polynomial of A, so the next A, P x (P x)^T, is P A P, and the result is the product of all P
    times x. For rows < columns that is cheaper. In bfloat16 the errors of small singular values would grow too large.
    """
    a, b, c = QUINTIC
    gram = x @ x.mT
    product = None
    for left in reversed(range(iterations)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    return x if product is None else product @ x
