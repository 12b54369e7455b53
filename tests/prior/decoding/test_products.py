"""Products with packed weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from prior.decoding.products import pack_linear

CHECKED = ("2.15",)  # versions of torch whose private products were checked

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw_factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 32, generator=generator).to(dtype), torch.randn(
        48, 32, generator=generator
    ).to(dtype)


def fails(*_: object) -> torch.Tensor:
    raise RuntimeError("not on this processor")


@TYPES
def test_a_product_is_that_with_the_weight(dtype: torch.dtype) -> None:
    x, weight = draw_factors(dtype)
    product = pack_linear(weight)(x)
    assert product.dtype == dtype
    exact = x.double() @ weight.double().T
    assert (product.double() - exact).norm() < (
        1e-6 if dtype == torch.float32 else 5e-3
    ) * exact.norm()


@TYPES
def test_a_row_of_a_product_is_the_same_whatever_is_beside_it(dtype: torch.dtype) -> None:
    x, weight = draw_factors(dtype)
    multiply = pack_linear(weight)
    for n in (1, 2, 7, 16, 33):
        torch.testing.assert_close(multiply(x[:n]), multiply(x)[:n], rtol=1e-6, atol=1e-6)


def test_torchs_private_products_are_used_in_the_versions_that_were_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With another version: read torch/_inductor/mkldnn_lowerings.py for their arguments, run this file, and add it."""
    assert torch.__version__.startswith(CHECKED)
    x, weight = draw_factors(torch.float32)
    multiply = pack_linear(weight)
    monkeypatch.setattr(F, "linear", fails)
    torch.testing.assert_close(multiply(x), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ops",
    [
        SimpleNamespace(),
        SimpleNamespace(_reorder_linear_weight=fails, _linear_pointwise=fails),
        SimpleNamespace(_reorder_linear_weight=lambda weight: weight, _linear_pointwise=fails),
    ],
    ids=["missing", "refusing the weight", "refusing the product"],
)
def test_without_torchs_own_layout_the_public_product_remains(
    ops: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = draw_factors(torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    assert torch.equal(pack_linear(weight)(x), x @ weight.T)


def test_a_product_keeps_the_weight_that_it_was_made_of() -> None:
    x, weight = draw_factors(torch.float32)
    expected = x @ weight.T
    multiply = pack_linear(torch.nn.Parameter(weight.clone()))
    torch.testing.assert_close(multiply(x), expected, rtol=1e-5, atol=1e-5)
    assert not multiply(x).requires_grad
