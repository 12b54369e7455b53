"""Residual and product codes."""

from functools import partial

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.kl import KL
from vqgan.quantizers.product import Product
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.search import flatten, nearest
from vqgan.quantizers.vq import VQ

K, DIM = 16, 6


def make_z_e(n: int = 2) -> torch.Tensor:
    return torch.randn(n, DIM, 4, 4)


def test_each_codebook_codes_the_residual_of_those_before_it() -> None:
    quantizer, x = make(Residual, partial(make, VQ), K, 3, DIM), make_z_e()
    q = quantizer(x)
    left, total = flatten(x), torch.zeros(32, DIM)
    for i, inner in enumerate(quantizer.inner_quantizers):
        codes = inner.codebook.detach()  # type: ignore[union-attr]
        index = nearest(left, codes)
        assert torch.equal(q.indices[..., i].flatten(), index)
        left, total = left - codes[index], total + codes[index]
    torch.testing.assert_close(flatten(q.z_q), total)


def test_more_codebooks_lower_the_error() -> None:
    x = torch.randn(4000, DIM)
    grid = x.t().reshape(1, DIM, 40, 100)
    errors = []
    for num_codebooks in (1, 2, 4):
        quantizer = make(Residual, partial(make, EMA), K, num_codebooks, DIM).eval()
        quantizer.initialise(x)
        errors.append(float((quantizer(grid).z_q - grid).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


@pytest.mark.parametrize("num_codebooks", [1, 2, 4])
def test_the_encoder_gets_the_decoders_gradient_once(num_codebooks: int) -> None:
    """The sum of the codebooks' straight-through estimators would be `num_codebooks` times as large."""
    quantizer, x, g = (
        make(Residual, partial(make, VQ), K, num_codebooks, DIM),
        make_z_e().requires_grad_(),
        make_z_e(),
    )
    quantizer(x).z_q.backward(g)
    torch.testing.assert_close(x.grad, g)


def test_every_codebooks_commitment_reaches_the_encoder() -> None:
    quantizer, x = (
        make(Residual, partial(make, VQ, beta=1.0), K, 2, DIM),
        make_z_e().requires_grad_(),
    )
    q = quantizer(x)
    q.loss.backward()
    expected = sum(2 * (part.z_e - part.z_q).detach() / x.numel() for part in q.parts) / 2
    torch.testing.assert_close(x.grad, expected)


def depths_of(q: Quantized, n: int) -> list[int]:
    """How many codebooks each of n images used."""
    return [sum(len(part.z_q) > i for part in q.parts) for i in range(n)]


def test_nested_dropout_decodes_and_trains_the_first_codebooks_of_each_image_only() -> None:
    quantizer, whole = (make(Residual, partial(make, EMA), K, 4, DIM, nested=p) for p in (0.6, 0.0))
    whole.load_state_dict(quantizer.state_dict())
    for _ in range(10):
        x = make_z_e(6)
        q, expected = quantizer.train()(x), whole.train()(x)
        depths = depths_of(q, 6)
        assert depths == sorted(depths, reverse=True)
        assert torch.equal(q.indices, expected.indices)
        for i, depth in enumerate(depths):
            z_q = whole.lookup(expected.indices[i : i + 1, ..., :depth])[0]
            torch.testing.assert_close(q.z_q[i], z_q)
        for i, part in enumerate(q.parts):
            assert torch.equal(part.z_e, expected.parts[i].z_e[: len(part.z_e)])
            assert torch.equal(part.indices, expected.indices[: len(part.z_e), ..., i])


def test_a_codebook_that_no_image_uses_is_not_updated() -> None:
    quantizer = make(Residual, partial(make, EMA), K, 4, DIM, nested=1.0).train()
    last = quantizer.inner_quantizers[3].counts.clone()  # type: ignore[operator]
    q = quantizer(make_z_e())
    quantizer.update(q)
    assert len(q.parts) < 4
    assert torch.equal(quantizer.inner_quantizers[3].counts, last)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_depths_of_nested_dropout_are_uniform_below_all_and_the_same_for_any_batch(n: int) -> None:
    quantizer = make(Residual, partial(make, EMA), K, 4, DIM, nested=0.6).train()
    torch.manual_seed(0)
    counted = torch.zeros(5)
    for _ in range(6000 // n):
        users = quantizer.count_users(n, torch.device("cpu"))
        for i in range(n):
            counted[sum(count is None or count > i for count in users)] += 1
    shares = counted / counted.sum()
    expected = torch.tensor([0, 0.2, 0.2, 0.2, 0.4])
    torch.testing.assert_close(shares, expected, atol=0.025, rtol=0)


def test_the_encoder_gets_the_decoders_gradient_once_at_every_depth() -> None:
    quantizer = make(Residual, partial(make, VQ), K, 4, DIM, nested=0.9).train()
    x, g = make_z_e(9).requires_grad_(), make_z_e(9)
    q = quantizer(x)
    q.z_q.backward(g)
    assert len(set(depths_of(q, 9))) > 2
    torch.testing.assert_close(x.grad, g)


def test_evaluation_uses_all_codebooks() -> None:
    quantizer = make(Residual, partial(make, EMA), K, 4, DIM, nested=1.0).eval()
    assert [len(part.z_q) for part in quantizer(make_z_e()).parts] == [2] * 4


def test_the_first_codebooks_alone_are_looked_up_as_their_sum() -> None:
    quantizer = make(Residual, partial(make, EMA), K, 3, DIM).eval()
    q = quantizer(make_z_e())
    assert list(quantizer.prefixes) == [1, 2, 3]
    for n in quantizer.prefixes:
        z_q = quantizer.lookup(q.indices[..., :n])
        torch.testing.assert_close(z_q, sum(part.z_q for part in q.parts[:n]))
    assert make(Residual, partial(make, EMA), K, 1, DIM).prefixes == ()


def test_product_codes_each_group_of_channels_separately() -> None:
    quantizer, x = make(Product, partial(make, VQ), K, 2, DIM), make_z_e()
    q = quantizer(x)
    for i, inner in enumerate(quantizer.inner_quantizers):
        codes = inner.codebook.detach()  # type: ignore[union-attr]
        index = nearest(flatten(x[:, i::2]), codes)
        assert torch.equal(q.indices[..., i].flatten(), index)
        torch.testing.assert_close(flatten(q.z_q[:, i::2]), codes[index])


def test_a_single_inner_codebook_behaves_as_that_codebook() -> None:
    x = make_z_e()
    for kind in (Product, Residual):
        quantizer, alone = make(kind, partial(make, VQ), K, 1, DIM), make(VQ, K, DIM)
        alone.load_state_dict(quantizer.inner_quantizers[0].state_dict())
        q, q1 = quantizer(x), alone(x)
        assert torch.equal(q.z_q, q1.z_q)
        assert torch.equal(q.indices, q1.indices)
        torch.testing.assert_close(q.loss, q1.loss)
        assert torch.equal(quantizer.lookup(q.indices), alone.lookup(q1.indices))


def test_a_continuous_bottleneck_inside_is_refused() -> None:
    with pytest.raises(InputError, match="quantizer.inner=KL must have exactly one codebook"):
        make(Residual, lambda K, dim: make(KL, dim), K, 2, DIM)


def test_the_bits_of_all_codebooks_count() -> None:
    assert make(Residual, partial(make, VQ), 16, 3, DIM).bits == 12


def test_product_bypasses_each_group_as_its_own_codebook_does() -> None:
    quantizer = make(Product, partial(make, EMA, cosine=True), K, 2, DIM)
    x = 5 * make_z_e()
    q = quantizer.bypass(x)
    assert q.indices is None
    assert torch.equal(q.z_q, quantizer(x).z_e)  # of length 1, as codes are
    assert torch.equal(q.z_q, q.z_e)
