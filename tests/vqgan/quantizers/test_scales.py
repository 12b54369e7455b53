"""Grids of several sizes: which there are, and how maps shrink to them and add up."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.quantizers.scales import (
    Scales,
    choose_convolution,
    plan_sizes,
    resize_scales,
    scale_sizes,
)

DIM = 3


def make_scales(*sides: int, convolutions: int = 2, strength: float = 0.5) -> Scales:
    torch.manual_seed(0)
    scales = Scales(DIM, sides, convolutions, strength)
    with torch.no_grad():
        for p in scales.parameters():
            p.copy_(torch.randn_like(p))
    return scales


def add_slowly(scales: Scales, vectors: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """The sum over scales by torch's own interpolation and convolution."""
    z_hat = torch.zeros(len(vectors[0]), DIM, *grid)
    for k, v in enumerate(vectors):
        h = F.interpolate(v, grid, mode="bicubic", align_corners=False)
        i = choose_convolution(k, len(vectors), scales.num_convolutions)
        kernel, bias = scales.get_parameter(f"kernel_{i}"), scales.get_parameter(f"bias_{i}")
        phi = F.conv2d(h, kernel, bias, padding=1)
        z_hat = z_hat + (1 - scales.strength) * h + scales.strength * phi
    return z_hat


def test_the_sides_up_to_16_are_those_of_var() -> None:
    assert [h for h, _ in plan_sizes((16, 16))] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


@pytest.mark.parametrize("side", range(1, 70))
def test_the_sides_grow_from_1_to_the_grid(side: int) -> None:
    sides = [h for h, _ in plan_sizes((side, side))]
    assert sides[0] == 1
    assert sides[-1] == side
    assert all(a < b <= max(2 * a, a + 1) for a, b in pairwise(sides))


def test_the_sides_of_a_rectangle_are_in_proportion() -> None:
    assert plan_sizes((2, 4)) == ((1, 1), (1, 2), (2, 3), (2, 4))


def test_scales_of_another_grid_cover_the_same_parts_of_the_image() -> None:
    sizes = ((1, 1), (2, 2), (4, 4), (8, 8))
    assert scale_sizes(sizes, (16, 24)) == ((2, 3), (4, 6), (8, 12), (16, 24))
    assert scale_sizes(sizes, (8, 8)) == sizes
    assert scale_sizes(sizes, (3, 3)) == ((1, 1), (1, 1), (2, 2), (3, 3))


def test_the_convolutions_of_published_models_are_in_the_order_of_their_table() -> None:
    assert [choose_convolution(k, 10, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 10])
def test_as_many_convolutions_as_scales_are_one_each(n: int) -> None:
    assert [choose_convolution(k, n, n) for k in range(n)] == list(range(n))


def test_a_convolution_that_no_scale_would_have_is_refused() -> None:
    with pytest.raises(InputError, match="convolutions=9 for 10 scales would leave some without"):
        Scales(DIM, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 9, 0.5)


def test_maps_shrink_to_the_means_of_cells() -> None:
    z, scales = torch.randn(2, DIM, 7, 7), make_scales(1, 3, 7)
    for size in ((1, 1), (3, 3), (2, 5)):  # the last is none of its own
        expected = F.interpolate(z, size, mode="area")
        torch.testing.assert_close(scales.shrink(z, size), expected, atol=1e-6, rtol=1e-5)
    assert scales.shrink(z, (7, 7)) is z


@pytest.mark.parametrize("grid", [(5, 5), (7, 11)])
def test_codes_add_up_as_by_torchs_own_interpolation(grid: tuple[int, int]) -> None:
    scales = make_scales(1, 2, 3, 5)
    vectors = [torch.randn(2, DIM, *size) for size in scales.sizes_on(grid)]
    z_hat = torch.zeros(2, DIM, *grid)
    for k, v in enumerate(vectors):
        z_hat = scales.add(z_hat, v, k)
    torch.testing.assert_close(z_hat, add_slowly(scales, vectors, grid), atol=1e-5, rtol=1e-5)


def test_convolutions_start_as_identities() -> None:
    with_some, without = Scales(DIM, [1, 2, 4], 4, 0.5), Scales(DIM, [1, 2, 4], 0, 0.5)
    v, start = torch.randn(2, DIM, 2, 2), torch.zeros(2, DIM, 4, 4)
    assert with_some.num_convolutions == 3
    torch.testing.assert_close(with_some.add(start, v, 1), without.add(start, v, 1))
    assert list(without.parameters()) == []


def test_a_frozen_copy_computes_the_same_and_has_no_parameters() -> None:
    scales = make_scales(1, 2, 4)
    frozen, v, start = scales.frozen(), torch.randn(2, DIM, 2, 2), torch.zeros(2, DIM, 4, 4)
    assert torch.equal(frozen.add(start, v, 1), scales.add(start, v, 1))
    assert list(frozen.parameters()) == []
    assert frozen.state_dict().keys() == scales.state_dict().keys()


def test_rows_of_codes_split_into_the_first_scales() -> None:
    scales = make_scales(1, 2, 3)
    codes = torch.arange(14)[None]
    maps = scales.split(codes)
    assert [tuple(part.shape) for part in maps] == [(1, 1, 1), (1, 2, 2), (1, 3, 3)]
    assert torch.equal(torch.cat([part.flatten(1) for part in maps], 1), codes)
    assert len(scales.split(codes[:, :5])) == 2
    for n in (0, 2, 13, 15):
        with pytest.raises(InputError, match=re.escape("its first scales have 1, 5, 14 codes")):
            scales.split(torch.zeros(1, n))


def test_a_code_is_touched_by_what_lies_in_its_cell() -> None:
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[0, 3] = True
    one, two, three, four = make_scales(1, 2, 3, 4).touched(known)
    assert one.all()
    assert two.tolist() == [[False, True], [False, False]]
    assert three.nonzero().tolist() == [[0, 2]]
    assert torch.equal(four, known)
    assert not any(part.any() for part in make_scales(1, 2, 3, 4).touched(known & ~known))


def test_scales_that_do_not_end_with_the_models_grid_are_refused() -> None:
    scales = make_scales(1, 2, 4)
    with pytest.raises(
        InputError, match=re.escape("[1,2,4] must end with 8, the grid of the model")
    ):
        scales.bind((8, 8))
    scales.bind((4, 4))


def test_the_setting_follows_another_grid() -> None:
    settings = {"scales": [1, 2, 4], "K": 16}
    resize_scales(settings, (4, 4), (4, 4))
    assert settings["scales"] == [1, 2, 4]
    resize_scales(settings, (8, 12), (4, 4))
    assert settings == {"scales": [[2, 3], [4, 6], [8, 12]], "K": 16}
    without = {"K": 16}
    resize_scales(without, (8, 8), (4, 4))
    assert without == {"K": 16}


def test_scales_that_the_grid_chose_follow_another_one_too() -> None:
    """As many as before: a larger grid would choose more of them."""
    chosen: dict[str, Any] = {"scales": None}
    resize_scales(chosen, (4, 4), (4, 4))
    assert chosen == {"scales": None}
    resize_scales(chosen, (8, 8), (4, 4))
    assert chosen == {"scales": [2, 4, 6, 8]}


def test_a_gradient_of_a_shrunken_and_enlarged_map_is_the_transpose() -> None:
    """Of linear maps A with x -> A x: <A x, y> = <x, A' y>."""
    scales = make_scales(1, 3, 5, convolutions=0)
    x, y = torch.randn(1, DIM, 5, 5, requires_grad=True), torch.randn(1, DIM, 3, 3)
    small = scales.shrink(x, (3, 3))
    (small * y).sum().backward()
    assert x.grad is not None
    expected = float((small * y).sum().detach())
    assert float((x.detach() * x.grad).sum()) == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(expected)
