"""Gradient estimators against slow versions from their definitions."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.parts import make
from vqgan.quantizers.gradients import direct, rotate, soft_lookup, straight_through
from vqgan.quantizers.vq import VQ


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


def test_diveq_is_exactly_z_q_with_the_gradient_of_z_e_plus_the_distance_in_a_fixed_direction() -> (
    None
):
    z_e = torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    z_q = torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 6, 2, 2, dtype=torch.float64)
    output = direct(z_e, z_q)
    assert torch.equal(output, z_q)
    gradients = torch.autograd.grad(output, (z_e, z_q), g)
    distance = (z_q - z_e).square().sum(1, keepdim=True).sqrt()
    slow = z_e + distance * ((z_q - z_e) / distance).detach()
    torch.testing.assert_close(slow, z_q)
    torch.testing.assert_close(gradients, torch.autograd.grad(slow, (z_e, z_q), g))
    of_encoder, of_code = gradients
    torch.testing.assert_close(of_encoder + of_code, g)  # nothing of the gradient is lost
    error = F.normalize((z_q - z_e).detach(), dim=1)
    assert ((error * of_encoder).sum(1).abs() < 1e-12).all()


def test_diveq_gives_the_whole_gradient_to_an_output_that_is_its_code() -> None:
    z_e, g = torch.randn(2, 5, 3, 3, requires_grad=True), torch.randn(2, 5, 3, 3)
    z_q = z_e.detach().clone().requires_grad_()
    of_encoder, of_code = torch.autograd.grad(direct(z_e, z_q), (z_e, z_q), g)
    assert torch.equal(of_encoder, g)
    assert not of_code.any()


def test_codes_learn_by_diveq_from_the_decoder_alone() -> None:
    """No loss of theirs, and the step that lowers the decoder's loss moves them along the error."""
    quantizer = make(VQ, 8, 4, gradient="diveq", beta=0.0)
    z_e = torch.randn(2, 4, 3, 3)
    q = quantizer(z_e)
    assert q.loss == 0
    g = torch.randn_like(q.z_q)
    (of_codes,) = torch.autograd.grad(q.z_q, quantizer.codebook, g)
    expected = torch.zeros_like(of_codes)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        k = int(q.indices[b, i, j])
        error = F.normalize(quantizer.codebook[k].detach() - z_e[b, :, i, j], dim=0)
        expected[k] += error * (error @ g[b, :, i, j])
    torch.testing.assert_close(of_codes, expected)
    plain = make(VQ, 8, 4, beta=0.0)
    assert plain(z_e).loss > 0
