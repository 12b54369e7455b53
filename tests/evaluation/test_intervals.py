"""Standard errors and intervals against scipy, and by identities."""

import math

import pytest
import torch
from scipy.stats import binomtest, norm

from codegrid.evaluation.intervals import NORMAL_95, Estimate, jackknife_variance, share_interval


@pytest.mark.parametrize(("count", "n"), [(0, 12), (7, 12), (12, 12), (300, 1000)])
def test_the_interval_of_a_share_is_scipys(count: int, n: int) -> None:
    theirs = binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert share_interval(count, n) == pytest.approx((theirs.low, theirs.high), abs=1e-7)


def test_the_jackknife_of_a_mean_is_its_variance() -> None:
    x = torch.randn(30, dtype=torch.float64)
    left_out = (x.sum() - x) / 29
    assert jackknife_variance(left_out) == pytest.approx(float(x.var()) / 30)


def test_an_interval_reaches_as_far_on_both_sides_and_not_below_the_least_score() -> None:
    assert norm.ppf(0.975) == pytest.approx(NORMAL_95)
    assert Estimate(2.0, 1.0).interval() == pytest.approx((2 - NORMAL_95, 2 + NORMAL_95))
    assert Estimate(1.0, 1.0).interval(least=0) == pytest.approx((0, 1 + NORMAL_95))
    assert Estimate(1.0, math.nan).interval() is None
