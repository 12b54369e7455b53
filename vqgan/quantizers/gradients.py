"""Gradient estimators for the step from encoder outputs to codes, which has no gradient."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError

Estimator = Callable[[Tensor, Tensor], Tensor]  # z_e and z_q, (n, dim, ...) -> exactly z_q


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q, with its gradient copied to z_e (van den Oord et al. 2017, section 3.2; Bengio et al. 2013)."""
    output: Tensor = _StraightThrough.apply(z_e, z_q)
    return output


def rotate(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q (B, dim, ...), with its gradient rotated and scaled onto z_e (Fifty et al. 2024, section 4.2).

    z_q = |z_q|/|z_e| R z_e, where the rotation R is held constant. R does not exist if either vector is zero or if they
    are opposite; the gradient is copied there.
    """
    output: Tensor = _Rotation.apply(z_e, z_q)
    return output


def direct(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q (B, dim, ...), with its gradient split between z_e and z_q (DiVeQ, Vali et al. 2026, in the limit of no noise).

    z_q = z_e + |z_q - z_e| d, where the direction d from z_e to z_q is held constant. z_q gets the part of the gradient
    along d, and z_e the rest. If both vectors are equal there is no direction, and z_e gets all of it.
    """
    output: Tensor = _Direction.apply(z_e, z_q)
    return output


ESTIMATORS: dict[str, Estimator] = {
    "straight_through": straight_through,
    "rotation": rotate,
    "diveq": direct,
}


def choose_estimator(gradient: str) -> Estimator:
    """The estimator that quantizer.gradient names. Raises InputError if there is none of this name."""
    if gradient not in ESTIMATORS:
        raise InputError(f"quantizer.gradient={gradient} must be one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[gradient]


def soft_lookup(p: Tensor, indices: Tensor, codes: Tensor) -> Tensor:
    """Exactly codes[indices], (n, dim), with the gradient of (onehot(indices) + p - sg(p)) @ codes.

    The chosen codes get a gradient directly. The probabilities p (n, K), and whatever computed them, get the gradient
    of p @ codes.
    """
    chosen = F.embedding(indices, codes)
    return straight_through(chosen + p @ codes.detach(), chosen.detach())


class _StraightThrough(torch.autograd.Function):
    """Forward exactly z_q; backward the gradient of z_q, passed to z_e.

    The usual z_e + (z_q - z_e).detach() rounds, so the decoder would train on vectors that `lookup` never returns.
    """

    @staticmethod
    def forward(ctx: Any, z_e: Tensor, z_q: Tensor) -> Tensor:
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Rotation(torch.autograd.Function):
    """Forward exactly z_q; backward the gradient through the rotation and scaling that map each z_e to its z_q."""

    @staticmethod
    def forward(ctx: Any, z_e: Tensor, z_q: Tensor) -> Tensor:
        ctx.save_for_backward(z_e, z_q)
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        z_e, z_q = ctx.saved_tensors
        g = gradients[0]
        norm_e = z_e.norm(dim=1, keepdim=True)
        norm_q = z_q.norm(dim=1, keepdim=True)
        tiny = torch.finfo(z_e.dtype).tiny
        e = z_e / norm_e.clamp(min=tiny)
        q = z_q / norm_q.clamp(min=tiny)
        r = e + q
        square = r.square().sum(1, keepdim=True)
        # The transpose of R = I - 2 r r^T / |r|^2 + 2 q e^T, applied to g.
        rotated = (
            g
            - 2 * r * (r * g).sum(1, keepdim=True) / square.clamp(min=tiny)
            + 2 * e * (q * g).sum(1, keepdim=True)
        )
        # A zero vector has no direction, and opposite vectors no unique rotation.
        has_rotation = (norm_e > 1e-6) & (norm_q > 1e-6) & (square > 1e-6)
        return torch.where(has_rotation, rotated * norm_q / norm_e.clamp(min=1e-6), g), None


class _Direction(torch.autograd.Function):
    """Forward exactly z_q; backward the gradient along the error z_q - z_e to z_q, and all else to z_e."""

    @staticmethod
    def forward(ctx: Any, z_e: Tensor, z_q: Tensor) -> Tensor:
        ctx.save_for_backward(z_e, z_q)
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        z_e, z_q = ctx.saved_tensors
        g = gradients[0]
        d = F.normalize(z_q - z_e, dim=1)
        along = d * (d * g).sum(1, keepdim=True)
        return g - along, along
