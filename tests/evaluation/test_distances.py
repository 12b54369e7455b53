"""Distances against public libraries on the same features, and by identities."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from codegrid.evaluation.distances import (
    count_in_balls,
    density_coverage,
    estimate_kid,
    frechet,
    frechet_of_moments,
    inception_score,
    kid,
    moments,
    precision_recall,
)

torch_fidelity = pytest.importorskip("torch_fidelity")


def two(n: int = 300, m: int = 200, D: int = 8) -> tuple[Tensor, Tensor]:
    """Overlapping clouds."""
    return torch.randn(n, D) @ torch.randn(D, D), torch.randn(m, D) @ torch.randn(D, D) + 0.3


def test_frechet_equals_torchmetrics_and_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = two()
    (mean_a, A), (mean_b, B) = moments(a), moments(b)
    assert frechet(a, b) == pytest.approx(float(_compute_fid(mean_a, A, mean_b, B)), rel=1e-9)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(x.double()) for x in (a, b)), verbose=False
    )
    assert frechet(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def make_statistics(D: int, shift: float) -> tuple[Tensor, Tensor]:
    """A mean (D,) and a covariance (D, D), float64, by a formula."""
    i = np.arange(D)
    basis = np.cos(np.outer(i + shift, i + 1) ** 1.1)
    covariance = basis @ basis.T / D + np.diag(1 / (i + 1))
    return torch.from_numpy(np.sin(i + shift)), torch.from_numpy(covariance)


def test_frechet_of_given_statistics_is_that_of_pytorch_fid_and_clean_fid() -> None:
    """pytorch-fid 0.3.0 and clean-fid 0.1.35, with SciPy 1.17.1, both gave this number for these statistics."""
    distance = frechet_of_moments(make_statistics(64, 0.0), make_statistics(64, 1.0))
    assert distance == pytest.approx(41.36240278631986, rel=1e-9)


def test_frechet_of_shifted_sets_is_the_squared_shift_and_of_scaled_ones_the_squared_change_of_spread() -> (
    None
):
    a, _ = two()
    assert frechet(a, a + 2) == pytest.approx(4 * 8, rel=1e-6)
    centred = a - a.mean(0)
    assert frechet(centred, 3 * centred) == pytest.approx(
        4 * float(moments(a)[1].trace()), rel=1e-6
    )


def test_moments_over_parts_of_the_rows_equal_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegrid.evaluation.distances.ROWS_AT_ONCE", 7)
    a, _ = two()
    mean, covariance = moments(a)
    np.testing.assert_allclose(mean.numpy(), a.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        covariance.numpy(), np.cov(a.double().numpy(), rowvar=False), rtol=1e-12
    )


def test_frechet_of_fewer_images_than_features_is_a_real_number() -> None:
    a, b = torch.randn(5, 40), torch.randn(6, 40)
    assert frechet(a, b) > 0
    assert frechet(a, a) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [50, 1000])
def test_kid_equals_torch_fidelitys_with_the_same_subsets(size: int) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = two(200, 200)
    settings = {
        "kid_subsets": 20 if size < 200 else 1,
        "kid_subset_size": min(size, 200),
        "rng_seed": 2020,
        "verbose": False,
    }
    theirs = kid_features_to_metric(a.double(), b.double(), **settings)[
        "kernel_inception_distance_mean"
    ]
    assert kid(a, b, subsets=20, size=size) == pytest.approx(theirs, rel=1e-9)


def test_paired_kid_equals_torch_fidelitys_u_statistic() -> None:
    from torch_fidelity.metric_kid import mmd2

    a, b = torch.randn(2, 50, 8).double()
    kernels = [((x @ y.t() / 8 + 1) ** 3).numpy() for x, y in ((a, a), (a, b), (b, b))]
    assert kid(a, b, paired=True) == pytest.approx(mmd2(*kernels, mmd_est="u-statistic"), rel=1e-9)


def test_an_image_and_its_own_reconstruction_do_not_make_kid_look_better() -> None:
    a = torch.randn(300, 8)
    assert kid(a, a) < -0.005  # both sets hold the same images
    assert kid(a, a, paired=True) == pytest.approx(0, abs=1e-12)
    assert kid(a, a, size=20, paired=True) == pytest.approx(0, abs=1e-12)
    noisy = torch.tensor(
        [kid(x, x + noise, paired=True) for x, noise in 0.3 * torch.randn(40, 2, 300, 8)]
    )
    apart = torch.tensor([kid(x, y + noise) for x, y, noise in 0.3 * torch.randn(40, 3, 300, 8)])
    assert float(noisy.mean()) == pytest.approx(
        float(apart.mean()), abs=3 * float(apart.std()) / 40**0.5
    )


def test_kid_is_unbiased_and_frechet_is_not() -> None:
    """KID of two sets from one distribution is 0 on average; the distance of small sets is far above that of large ones."""
    pairs = [torch.randn(2, 40, 8) for _ in range(60)]
    estimates = torch.tensor([kid(a, b) for a, b in pairs])
    assert abs(float(estimates.mean())) < 3 * float(estimates.std()) / 60**0.5
    assert frechet(*pairs[0]) > 5 * frechet(*torch.randn(2, 4000, 8))


def leave_each_out(a: Tensor, b: Tensor, paired: bool) -> float:
    """The jackknife's variance of KID by computing it without each image in turn, or without each pair."""
    variance = 0.0
    for side in (0,) if paired else (0, 1):
        values = []
        for i in range(len(a)):
            rest = torch.arange(len(a)) != i
            x, y = (a[rest], b[rest]) if paired else (a[rest], b) if side == 0 else (a, b[rest])
            values.append(kid_of_all(x, y, paired))
        variance += float(np.var(values)) * (len(values) - 1)
    return variance


def kid_of_all(x: Tensor, y: Tensor, paired: bool) -> float:
    """The estimate of sets of any two sizes, by listing all pairs."""
    both = np.concatenate([x.double().numpy(), y.double().numpy()])
    k = (both @ both.T / x.shape[1] + 1) ** 3
    n, m = len(x), len(y)
    first = [k[i, j] for i in range(n) for j in range(n) if i != j]
    second = [k[n + i, n + j] for i in range(m) for j in range(m) if i != j]
    across = [k[i, n + j] for i in range(n) for j in range(m) if not (paired and i == j)]
    return float(np.mean(first) + np.mean(second) - 2 * np.mean(across))


@pytest.mark.parametrize("paired", [False, True])
def test_the_error_of_kid_is_that_of_leaving_out_each_image_in_turn(paired: bool) -> None:
    a, b = torch.randn(9, 4), torch.randn(9, 4) + 0.5
    estimate = estimate_kid(a, b, paired=paired)
    assert estimate.value == pytest.approx(kid_of_all(a, b, paired), rel=1e-9)
    assert estimate.error == pytest.approx(leave_each_out(a, b, paired) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_of_kid_hold_its_true_value(shift: float) -> None:
    """Which is its mean, as it is unbiased."""
    estimates = [estimate_kid(torch.randn(60, 4), torch.randn(60, 4) + shift) for _ in range(150)]
    values = torch.tensor([estimate.value for estimate in estimates])
    truth = float(values.mean())
    intervals = [estimate.interval() for estimate in estimates]
    covered = np.mean([ends is not None and ends[0] <= truth <= ends[1] for ends in intervals])
    assert covered > 0.88
    errors = torch.tensor([estimate.error for estimate in estimates])
    # Of one distribution all of KID is noise, and the jackknife's error of it too large.
    assert 0.8 < float(errors.mean() / values.std()) < (1.8 if shift == 0 else 1.25)


def test_subsets_have_the_error_of_all_images() -> None:
    """The standard deviation over subsets, which overlap and are smaller, is twice as large."""
    a, b = torch.randn(400, 4), torch.randn(400, 4) + 0.5
    whole = estimate_kid(a, b)
    subsets = estimate_kid(a, b, subsets=60, size=100)
    assert subsets.error == pytest.approx(whole.error, rel=0.2)
    assert subsets.value == pytest.approx(whole.value, abs=2 * whole.error)


def test_two_images_have_a_kid_and_no_error() -> None:
    estimate = estimate_kid(torch.randn(2, 3), torch.randn(2, 3))
    assert math.isfinite(estimate.value)
    assert estimate.interval() is None


def test_inception_score_equals_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(207, 6)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)[
        "inception_score_mean"
    ]
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-9)


def test_inception_score_is_the_number_of_classes_for_confident_varied_images_and_1_for_equal_ones() -> (
    None
):
    sure = 1e4 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=1) == pytest.approx(5)
    assert inception_score(torch.randn(1, 5).repeat(20, 1)) == pytest.approx(1)


def test_precision_and_recall_equal_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = two()
    settings = {
        "prc_neighborhood": 3,
        "prc_batch_size": 64,
        "save_cpu_ram": False,
        "verbose": False,
    }
    theirs = prc_features_to_metric(fake.double(), real.double(), **settings)
    precision, recall = precision_recall(real, fake, 3)
    assert 0 < precision < 1
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_density_and_coverage_equal_a_slow_double_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "codegrid.evaluation.distances.ENTRIES_AT_ONCE", 100
    )  # a row or two at a time
    real, fake = two(60, 40)
    k, within, holding = 5, 0, 0
    for r in real:
        radius = sorted(float((r - other).norm()) for other in real)[k]
        hits = sum(float((r - f).norm()) <= radius for f in fake)
        within, holding = within + hits, holding + (hits > 0)
    assert density_coverage(real, fake, k) == pytest.approx((within / (k * 40), holding / 60))


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_identical_sets_have_no_distance_and_full_precision_recall_and_coverage(far: float) -> None:
    a = (
        torch.cat([torch.randn(60, 8), torch.ones(30, 8)]) + far
    )  # with many copies of one point, such as empty images
    assert frechet(a, a) == pytest.approx(0, abs=1e-5)
    assert precision_recall(a, a.flip(0)) == (1, 1)
    assert density_coverage(a, a.flip(0))[1] == 1


def test_a_prior_that_repeats_one_good_image_has_full_precision_and_no_recall() -> None:
    real = torch.randn(200, 8)
    fake = real[:1] + 1e-4 * torch.randn(200, 8)
    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == (1, pytest.approx(0, abs=0.02))
    assert density_coverage(real, fake)[1] < 0.1


def test_sets_far_apart_have_nothing_in_common() -> None:
    real, fake = torch.randn(50, 8), torch.randn(50, 8) + 100
    assert precision_recall(real, fake) == (0, 0)
    assert density_coverage(real, fake) == (0, 0)


def test_a_ball_reaches_to_the_kth_other_point_and_its_border_belongs_to_it() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0]])
    within, holding = count_in_balls(torch.tensor([[-1.0], [5.1]]), line, 1)
    assert within.tolist() == [1, 0]  # -1 is as far from 0 as 1 is
    assert holding.tolist() == [1, 0, 0]


def test_a_distance_of_features_that_are_no_numbers_is_no_zero() -> None:
    """max(0.0, nan) is 0.0, a perfect score."""
    broken = torch.randn(8, 3)
    broken[0] = torch.nan
    logits = broken.clone()
    assert math.isnan(inception_score(logits, splits=2))
    assert math.isnan(kid(broken, torch.randn(8, 3)))


def test_inception_score_of_classes_without_any_probability_is_a_number() -> None:
    impossible = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, -torch.inf, 5.0]]).repeat(4, 1)
    assert 1 <= inception_score(impossible, splits=2) <= 2


@pytest.mark.parametrize("n", [2, 5])
def test_sets_without_spread_have_the_squared_distance_of_their_means(n: int) -> None:
    a, b = torch.zeros(n, 6), torch.full((n, 6), 0.5)
    assert frechet(a, b) == pytest.approx(6 * 0.25)
    assert frechet(a, a) == 0
    assert kid(a, a) == 0
    assert density_coverage(torch.zeros(9, 2), torch.zeros(9, 2)) == (pytest.approx(9 / 5), 1)
