from fractions import Fraction

import pytest
import torch

from prior.orders import halton, raster, shuffled


def test_every_order_visits_every_place_once() -> None:
    assert all(
        sorted(order.tolist()) == list(range(7)) for order in (*raster(3, 7), *shuffled(50, 7))
    )


def test_random_orders_are_all_as_likely() -> None:
    counts = (shuffled(24_000, 4) @ 10 ** torch.arange(4)).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert (
        (counts - 1000).square() / 1000
    ).sum() < 50  # 23 degrees of freedom: 99.9% of fair draws stay below


def test_each_sample_has_an_order_of_its_own_random_as_often_as_asked() -> None:
    share = (shuffled(4000, 9, share=0.3) != raster(4000, 9)).any(1).float().mean()
    assert share == pytest.approx(0.3, abs=0.03)
    assert torch.equal(shuffled(50, 9, share=0.0), raster(50, 9))
    assert (shuffled(50, 9, share=1.0) != raster(50, 9)).any(1).all()


def first_visits(h: int, w: int) -> list[int]:
    """The Halton order point by point, in fractions."""

    def mirror(i: int, base: int) -> Fraction:
        value, place = Fraction(0), Fraction(1, base)
        while i:
            value, place, i = value + i % base * place, place / base, i // base
        return value

    visited: list[int] = []
    i = 0
    while len(visited) < h * w:
        i += 1
        position = int(mirror(i, 2) * h) * w + int(mirror(i, 3) * w)
        if position not in visited:
            visited.append(position)
    return visited


@pytest.mark.parametrize("grid", [(1, 1), (1, 32), (7, 1), (2, 2), (3, 5), (8, 8), (5, 12)])
def test_a_halton_order_visits_each_place_when_the_sequence_first_does(
    grid: tuple[int, int],
) -> None:
    assert list(halton(grid)) == first_visits(*grid)


@pytest.mark.parametrize("grid", [(16, 16), (16, 24), (30, 40), (64, 64)])
def test_a_halton_order_of_a_large_grid_visits_every_place_once(grid: tuple[int, int]) -> None:
    assert sorted(halton(grid)) == list(range(grid[0] * grid[1]))


def test_places_of_a_halton_order_are_spread_evenly_wherever_it_begins_and_stops() -> None:
    def mean_excess(order: torch.Tensor) -> float:
        """By how much one quarter of the grid has more or fewer than a quarter of the places visited, on average."""
        quarter = (order // 16 // 8 * 2 + order % 16 // 8)[:, None] == torch.arange(4)
        visited = quarter.repeat(2, 1).double().cumsum(0)
        expected = torch.arange(256)[:, None] / 4
        walks = [visited[i : i + 256] - visited[i] for i in range(0, 256, 16)]
        return float(torch.stack([(walk - expected).abs().amax(1) for walk in walks]).mean())

    assert mean_excess(torch.tensor(halton((16, 16)))) < 1.5
    assert mean_excess(shuffled(1, 256)[0]) > 2.5
    assert mean_excess(torch.arange(256)) > 10
