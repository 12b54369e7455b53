"""One gradient of several losses, against plain autograd and shares by hand."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.stage1 import paper_weight
from vqgan.losses.balancer import Balancer, Term
from vqgan.losses.weight import AdaptiveWeight, ConstantWeight


def decode() -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A decoder's last layer, the reconstruction x_hat, and a leaf with its values."""
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1)
    x_hat = last(torch.randn(2, 4, 8, 8))
    return last, x_hat, x_hat.detach().requires_grad_()


def losses(x_hat: Tensor) -> dict[str, Tensor]:
    return {
        "rec": (x_hat - 1).square().mean(),
        "adversarial": -x_hat.sin().mean(),
        "perceptual": x_hat.abs().mean(),
    }


WEIGHTS = {"rec": 1.0, "adversarial": 0.5, "perceptual": 0.2}


def terms(x_hat: Tensor) -> dict[str, Term]:
    return {name: Term(WEIGHTS[name], loss) for name, loss in losses(x_hat).items()}


def slow_pulls(x_hat: Tensor, lambda_: float) -> dict[str, Tensor]:
    factors = WEIGHTS | {"adversarial": WEIGHTS["adversarial"] * lambda_}
    x_hat = x_hat.detach().requires_grad_()
    return {
        name: factors[name] * torch.autograd.grad(loss, x_hat)[0]
        for name, loss in losses(x_hat).items()
    }


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_the_gradient_is_that_of_the_weighted_sum_of_the_losses(loss_scale: float) -> None:
    last, x_hat, leaf = decode()
    balancer = Balancer(ConstantWeight(0.3))
    gradient, _ = balancer.balance(terms(leaf), leaf, x_hat, last.weight, loss_scale=loss_scale)
    values = losses(x_hat)
    total = values["rec"] + 0.5 * 0.3 * values["adversarial"] + 0.2 * values["perceptual"]
    expected = torch.autograd.grad(total, last.weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(x_hat, last.weight, gradient), expected)


def test_the_shares_are_those_of_the_gradients_norms_and_add_up_to_one() -> None:
    last, x_hat, leaf = decode()
    _, shares = Balancer(ConstantWeight(0.3)).balance(terms(leaf), leaf, x_hat, last.weight)
    norms = {name: float(pull.norm()) for name, pull in slow_pulls(x_hat, 0.3).items()}
    for name, norm in norms.items():
        assert float(shares[f"share_{name}"]) == pytest.approx(norm / sum(norms.values()))
    assert float(sum(shares.values())) == pytest.approx(1)


def test_lambda_compares_the_adversarial_loss_with_all_others_at_the_last_layer() -> None:
    last, x_hat, leaf = decode()
    balancer = Balancer(paper_weight(scale=1.0))
    balancer.balance(terms(leaf), leaf, x_hat, last.weight)
    values = losses(x_hat)
    rec = values["rec"] + 0.2 * values["perceptual"]
    above = torch.autograd.grad(rec, last.weight, retain_graph=True)[0].norm()
    below = torch.autograd.grad(values["adversarial"], last.weight)[0].norm()
    figures = balancer.update()
    torch.testing.assert_close(figures["lambda"], above / (below + 1e-6))
    torch.testing.assert_close((figures["grad_rec"], figures["grad_adv"]), (above, below))


def test_lambda_serves_the_next_update_and_only_measuring_changes_the_balancer() -> None:
    last, x_hat, leaf = decode()
    adaptive = paper_weight(scale=1.0)
    balancer = Balancer(adaptive)
    first, shares = balancer.balance(terms(leaf), leaf, x_hat, last.weight, share=0.5)
    again, _ = balancer.balance(terms(leaf), leaf, x_hat, last.weight, share=0.5)
    assert torch.equal(first, again)
    assert shares["share_adversarial"] == 0
    balancer.update()
    second, _ = balancer.balance(terms(leaf), leaf, x_hat, last.weight)
    pulls = slow_pulls(x_hat, float(adaptive.weight))
    torch.testing.assert_close(second, torch.stack(list(pulls.values())).sum(0))
    assert leaf.grad is None
    assert last.weight.grad is None


@pytest.mark.parametrize("adaptive", [None, paper_weight()])
def test_without_an_adversarial_loss_nothing_is_measured(adaptive: AdaptiveWeight | None) -> None:
    last, x_hat, leaf = decode()
    only = {name: term for name, term in terms(leaf).items() if name != "adversarial"}
    gradient, shares = Balancer(adaptive).balance(only, leaf, x_hat, last.weight)
    pulls = slow_pulls(x_hat, 0.0)
    torch.testing.assert_close(gradient, pulls["rec"] + pulls["perceptual"])
    assert shares.keys() == {"share_rec", "share_perceptual"}
    assert adaptive is None or adaptive._sums is None
