"""Gradient estimators against slow versions from their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan.quantizers.gradients import rotate, soft_lookup, straight_through


def test_straight_through_is_exactly_z_q() -> None:
    z_e, z_q = 1e6 * torch.randn(100), 1e-3 * torch.randn(100)
    assert torch.equal(straight_through(z_e, z_q), z_q)
    assert not torch.equal(z_e + (z_q - z_e).detach(), z_q)  # the usual form rounds


def test_straight_through_copies_the_gradient() -> None:
    z_e, g = torch.randn(2, 5, 3, 3, requires_grad=True), torch.randn(2, 5, 3, 3)
    straight_through(z_e, torch.randn(2, 5, 3, 3)).backward(g)
    assert z_e.grad is not None
    assert torch.equal(z_e.grad, g)


def slow_rotation(e: Tensor, q: Tensor) -> Tensor:
    """|q|/|e| R with the rotation in the plane of e and q, from the definition of a rotation by an angle in a plane."""
    u, w = e / e.norm(), q / q.norm()
    across = w - (w @ u) * u
    v = across / across.norm()
    angle = torch.atan2(w @ v, w @ u)
    one = torch.eye(len(e), dtype=e.dtype)
    plane = torch.outer(u, u) + torch.outer(v, v)
    turn = torch.cos(angle) * plane + torch.sin(angle) * (torch.outer(v, u) - torch.outer(u, v))
    return q.norm() / e.norm() * (one - plane + turn)


def test_rotation_turns_the_gradient_as_z_e_turns_to_z_q() -> None:
    z_e = torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    z_q, g = (
        torch.randn(4, 6, 2, 2, dtype=torch.float64),
        torch.randn(4, 6, 2, 2, dtype=torch.float64),
    )
    rotated = rotate(z_e, z_q)
    assert torch.equal(rotated, z_q)
    rotated.backward(g)
    assert z_e.grad is not None
    for b in range(4):
        R = slow_rotation(z_e[b, :, 1, 0].detach(), z_q[b, :, 1, 0])
        torch.testing.assert_close(R @ z_e[b, :, 1, 0].detach(), z_q[b, :, 1, 0])
        torch.testing.assert_close(z_e.grad[b, :, 1, 0], R.t() @ g[b, :, 1, 0])


@pytest.mark.parametrize("case", ["zero z_e", "zero z_q", "opposite"])
def test_the_gradient_is_copied_if_no_rotation_exists(case: str) -> None:
    z = torch.randn(1, 4, 1, 1)
    z_e = (torch.zeros_like(z) if case == "zero z_e" else z).clone().requires_grad_()
    z_q = torch.zeros_like(z) if case == "zero z_q" else -z
    g = torch.randn_like(z)
    rotate(z_e, z_q).backward(g)
    assert z_e.grad is not None
    assert torch.equal(z_e.grad, g)


def test_the_rotation_between_equal_vectors_is_the_identity() -> None:
    z_e, g = torch.randn(2, 5, 3, 3, requires_grad=True), torch.randn(2, 5, 3, 3)
    rotate(z_e, z_e.detach()).backward(g)
    torch.testing.assert_close(z_e.grad, g)


def test_soft_lookup_is_onehot_plus_p_minus_sg_p_times_the_codes() -> None:
    logits, codes, g = (
        torch.randn(7, 16, requires_grad=True),
        torch.randn(16, 6, requires_grad=True),
        torch.randn(7, 6),
    )
    indices = logits.argmax(1)
    soft_lookup(logits.softmax(1), indices, codes).backward(g)
    gradients = logits.grad.clone(), codes.grad.clone()
    logits.grad = codes.grad = None
    p = logits.softmax(1)
    ((F.one_hot(indices, 16) + p - p.detach()) @ codes).backward(g)
    torch.testing.assert_close(gradients, (logits.grad, codes.grad))
