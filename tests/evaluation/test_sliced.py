"""MIND against a brute-force transport of the projected points, and by identities."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from codegrid.evaluation.intervals import Estimate
from codegrid.evaluation.sliced import draw_directions, mind, transport_costs


def transport_slowly(x: Tensor, y: Tensor) -> float:
    """The squared Wasserstein distance of numbers x (n,) and y (m,): the best of all pairings of as many copies of each."""
    copies = np.lcm(len(x), len(y))
    a, b = (np.repeat(each.numpy(), copies // len(each)) for each in (x, y))
    costs = (a[:, None] - b[None]) ** 2
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].mean())


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (3, 8), (5, 2)])
def test_it_is_the_mean_over_directions_of_the_best_pairing_of_projections(n: int, m: int) -> None:
    a, b = torch.randn(n, 5), 1.5 * torch.randn(m, 5) + 0.3
    directions = draw_directions(5, 12, seed=3)
    slow = [transport_slowly(a.double() @ u, b.double() @ u) for u in directions]
    assert mind(a, b, directions=12, seed=3).value == pytest.approx(3 * 5 * np.mean(slow), rel=1e-9)


def test_directions_are_unit_vectors_of_the_seed_in_float32() -> None:
    directions = draw_directions(7, 40, seed=1)
    drawn = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(directions, torch.nn.functional.normalize(drawn).double())
    assert not torch.equal(directions, draw_directions(7, 40, seed=2))


def test_a_shift_costs_three_times_its_square_and_paired_it_has_no_error() -> None:
    """The mean of (u s)^2 over the sphere is |s|^2 / D."""
    a, shift = torch.randn(40, 4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    shifted = mind(a, a + shift, directions=20_000, paired=True)
    assert shifted.value == pytest.approx(3 * float(shift.square().sum()), rel=0.02)
    assert shifted.error == pytest.approx(0, abs=1e-6)
    assert mind(a, a + shift, directions=50).error > 0.1  # other shifted images


def test_the_same_images_are_at_distance_0_and_both_sets_are_alike() -> None:
    a, b = torch.randn(9, 3), torch.randn(6, 3)
    assert mind(a, a.flip(0), directions=30).value == 0
    one, other = mind(a, b, directions=30), mind(b, a, directions=30)
    assert (one.value, one.error) == pytest.approx((other.value, other.error), rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_neither_order_nor_the_parts_of_the_computation_change_it(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.randn(30, 6), torch.randn(30, 6) + 0.2
    expected = mind(a, b, directions=40, paired=paired)
    monkeypatch.setattr("codegrid.evaluation.sliced.PROJECTIONS_AT_ONCE", 200)
    rows = torch.randperm(30)
    others = rows if paired else torch.randperm(30)
    again = mind(a[rows], b[others], directions=40, paired=paired)
    assert (again.value, again.error) == pytest.approx((expected.value, expected.error), rel=1e-9)
    if paired:
        broken = mind(a, b[torch.randperm(30)], directions=40, paired=True)
        assert broken.error != pytest.approx(expected.error, rel=1e-3)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 50)])
def test_the_error_is_the_jackknifes_for_sets_that_differ(n: int, m: int) -> None:
    """Which is computed here by leaving out each image in turn."""
    a, b = torch.randn(n, 3), 1.5 * torch.randn(m, 3) + 1

    def leave_out(i: int) -> float:
        rows = torch.arange(n + m) != i
        return mind(a[rows[:n]], b[rows[n:]], directions=30).value

    variance = 0.0
    for part in (range(n), range(n, n + m)):
        values = np.array([leave_out(i) for i in part])
        variance += float(np.square(values - values.mean()).sum()) * (len(values) - 1) / len(values)
    assert mind(a, b, directions=30).error == pytest.approx(variance**0.5, rel=0.1)


def draw(n: int, shift: float) -> Estimate:
    return mind(torch.randn(n, 4), torch.randn(n, 4) + shift, directions=40)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_intervals_hold_what_sets_of_this_size_have_on_average(shift: float) -> None:
    estimates = [draw(60, shift) for _ in range(120)]
    mean = np.mean([estimate.value for estimate in estimates])
    intervals = [estimate.interval(least=0) for estimate in estimates]
    covered = np.mean([ends is not None and ends[0] <= mean <= ends[1] for ends in intervals])
    assert covered > 0.85
    spread = np.std([estimate.value for estimate in estimates])
    # Of sets from one distribution the distance is all noise, and the error is up to twice too large.
    errors = np.mean([estimate.error for estimate in estimates])
    assert 0.8 * spread < errors < (2.2 if shift == 0 else 1.25) * spread


def test_sets_drawn_with_replacement_lie_above_the_distance_itself() -> None:
    """So the quantiles of bootstrap replicates would be no interval of it."""
    a, b = torch.randn(50, 4), torch.randn(50, 4)
    value = mind(a, b, directions=40).value
    drawn = [
        mind(a[torch.randint(50, (50,))], b[torch.randint(50, (50,))], directions=40).value
        for _ in range(40)
    ]
    assert np.quantile(drawn, 0.05) > value


def test_features_that_are_no_numbers_have_no_distance() -> None:
    broken = torch.randn(8, 3)
    broken[0] = torch.nan
    assert np.isnan(mind(broken, torch.randn(8, 3)).value)


def test_costs_of_unequal_sets_are_those_of_their_quantile_functions() -> None:
    x, y = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[0.0, 0.0, 3.0]]).double()
    # 0 -> 0 on the first third, and on the next sixth; 1 -> 0 on a sixth, 1 -> 3 on the last third.
    assert transport_costs(x, y).tolist() == pytest.approx([1 / 6 + 4 / 3])
