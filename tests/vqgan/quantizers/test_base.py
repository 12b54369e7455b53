import pytest
import torch
from torch import Tensor

from vqgan.quantizers.anneal import Anneal
from vqgan.quantizers.gradients import rotate, straight_through
from vqgan.quantizers.search import nearest


def test_nearest_is_the_argmin_of_explicit_distances() -> None:
    vectors, codebook = torch.randn(50, 5), torch.randn(9, 5)
    slow = [min(range(9), key=lambda k: float(((v - codebook[k]) ** 2).sum())) for v in vectors]
    assert nearest(vectors, codebook).tolist() == slow
    assert (
        nearest(vectors, codebook, max_scores=28, tile=4, group=2).tolist() == slow
    )  # in small parts, the same


def test_of_equal_codes_the_first_is_nearest() -> None:
    code = torch.randn(1, 5)
    assert nearest(torch.randn(20, 5), code.expand(7, 5)).tolist() == [0] * 20


def test_bf16_distances_would_choose_other_codes() -> None:
    """Why the search is a float32 island: the trap that this house's autocast test guards against is real."""
    vectors, codebook = torch.randn(2000, 32), torch.randn(512, 32)
    distances = torch.cdist(vectors.bfloat16().float(), codebook.bfloat16().float()).bfloat16()
    assert (distances.argmin(1) != nearest(vectors, codebook)).float().mean() > 0.02


def test_straight_through_is_exactly_z_q() -> None:
    z_e, z_q = 1e6 * torch.randn(100), 1e-3 * torch.randn(100)
    assert torch.equal(straight_through(z_e, z_q), z_q)
    assert not torch.equal(z_e + (z_q - z_e).detach(), z_q)  # the usual form rounds


def test_straight_through_hands_the_gradient_on_unchanged() -> None:
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
def test_where_no_rotation_exists_the_gradient_is_copied(case: str) -> None:
    z = torch.randn(1, 4, 1, 1)
    z_e = (torch.zeros_like(z) if case == "zero z_e" else z).clone().requires_grad_()
    z_q = torch.zeros_like(z) if case == "zero z_q" else -z
    g = torch.randn_like(z)
    rotate(z_e, z_q).backward(g)
    assert z_e.grad is not None
    assert torch.equal(z_e.grad, g)


def test_of_equal_vectors_the_rotation_is_none() -> None:
    z_e, g = torch.randn(2, 5, 3, 3, requires_grad=True), torch.randn(2, 5, 3, 3)
    rotate(z_e, z_e.detach()).backward(g)
    torch.testing.assert_close(z_e.grad, g)


def test_an_annealed_value_goes_in_equal_ratios_or_from_and_to_zero_in_equal_steps() -> None:
    ratios, steps = Anneal(1.0, 0.25, 10), Anneal(0.0, 1.0, 10)
    assert [ratios(n) for n in (0, 5, 10, 99)] == [1.0, 0.5, 0.25, 0.25]
    assert [steps(n) for n in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert Anneal(3.0, 2.0, 0)(0) == 2.0
