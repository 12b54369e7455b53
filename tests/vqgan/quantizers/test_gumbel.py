import math

import torch
import torch.nn.functional as F

from tests.helpers.parts import make
from vqgan.quantizers.anneal import Anneal
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.search import flatten, nearest

K, DIM = 16, 6


def test_codes_are_sampled_with_the_probabilities_of_the_logits() -> None:
    quantizer = make(Gumbel, 4, 2).train()
    x = torch.tensor([0.7, -1.0]).view(1, 2, 1, 1).expand(50, 2, 20, 20)
    frequencies = torch.bincount(quantizer(x).indices.flatten(), minlength=4) / 20_000
    expected = quantizer.logits(torch.tensor([0.7, -1.0])).softmax(0)
    torch.testing.assert_close(frequencies, expected.detach(), atol=0.015, rtol=0)


def test_evaluation_takes_the_most_likely_code() -> None:
    quantizer, x = make(Gumbel, K, DIM).eval(), torch.randn(2, DIM, 4, 4)
    assert torch.equal(quantizer(x).indices.flatten(), quantizer.logits(flatten(x)).argmax(1))


def test_the_loss_is_the_divergence_from_the_uniform_distribution() -> None:
    quantizer, x = make(Gumbel, K, DIM, kl_weight=0.1), torch.randn(2, DIM, 4, 4)
    p = torch.distributions.Categorical(logits=quantizer.logits(flatten(x)))
    uniform = torch.distributions.Categorical(logits=torch.zeros(K))
    torch.testing.assert_close(
        quantizer(x).loss, 0.1 * torch.distributions.kl_divergence(p, uniform).mean()
    )


def test_a_uniform_choice_has_zero_loss() -> None:
    quantizer = make(Gumbel, K, DIM, kl_weight=1.0)
    torch.nn.init.zeros_(quantizer.logits.weight)
    torch.nn.init.zeros_(quantizer.logits.bias)
    assert abs(float(quantizer(torch.randn(2, DIM, 4, 4)).loss.detach())) < 1e-6


def test_the_gradient_is_that_of_the_softmax_at_the_temperature() -> None:
    quantizer, x = (
        make(Gumbel, K, DIM, temperature=0.7, kl_weight=0.0).train(),
        torch.randn(1, DIM, 2, 2, requires_grad=True),
    )
    g = torch.randn(4, DIM)
    torch.manual_seed(3)
    (flatten(quantizer(x).z_q) * g).sum().backward()
    gradient, x.grad = x.grad, None
    torch.manual_seed(3)
    logits = quantizer.logits(flatten(x))
    p = F.softmax((logits - torch.empty_like(logits).exponential_().log()) / 0.7, 1)
    ((p @ quantizer.codebook) * g).sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_the_temperature_falls_with_the_updates() -> None:
    quantizer, x = (
        make(Gumbel, K, DIM, temperature=Anneal(1.0, 0.25, 10)),
        torch.randn(1, DIM, 2, 2),
    )
    temperatures = []
    for _ in range(11):
        q = quantizer(x)
        temperatures.append(float(q.terms["temperature"]))
        quantizer.update(q)
    assert temperatures[0] == 1.0
    assert math.isclose(temperatures[5], 0.5)
    assert math.isclose(temperatures[10], 0.25)


def test_after_initialisation_it_takes_the_nearest_code() -> None:
    quantizer, points = make(Gumbel, K, DIM).eval(), torch.randn(500, DIM)
    quantizer.initialise(points)
    indices = quantizer(points.t().reshape(1, DIM, 20, 25)).indices.flatten()
    assert torch.equal(indices, nearest(points, quantizer.codebook.detach()))
