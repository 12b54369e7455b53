"""The distance of code histograms (CHD) against a slow loop, and by identities."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from codegrid.evaluation.codebook import CodebookUse
from codegrid.evaluation.histograms import histogram_distance, mixed_distance, tally_codes

K = 12


def draw(
    n: int, seed: int, shape: tuple[int, ...] = (4, 4), tilt: float = 0.0
) -> NDArray[np.int64]:
    """Codes of images; with a tilt the first half of the codes is more frequent."""
    random = np.random.default_rng(seed)
    p = np.ones(K)
    p[: K // 2] += tilt
    return random.choice(K, (n, *shape), p=p / p.sum())


def measure(a: NDArray[np.int64], b: NDArray[np.int64], code_use: CodebookUse) -> float:
    return histogram_distance(tally_codes(a, code_use), tally_codes(b, code_use))


def measure_slowly(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    p, q = Counter(a.ravel().tolist()), Counter(b.ravel().tolist())
    overlap = sum(math.sqrt(p[k] / a.size * q[k] / b.size) for k in range(K))
    return math.sqrt(1 - overlap)


def test_it_is_the_root_of_what_the_overlap_lacks() -> None:
    a, b = draw(9, 0), draw(7, 1, tilt=3.0)
    assert measure(a, b, CodebookUse(K)) == pytest.approx(measure_slowly(a, b), rel=1e-9)
    assert measure(a, a[::-1].copy(), CodebookUse(K)) == 0
    assert measure(np.zeros_like(a), np.ones_like(a), CodebookUse(K)) == 1


def test_of_several_codebooks_it_is_the_mean() -> None:
    a, b = draw(9, 0, (4, 4, 2)), draw(9, 1, (4, 4, 2), tilt=2.0)
    b[..., 1] = a[..., 1]
    expected = measure_slowly(a[..., 0], b[..., 0]) / 2
    assert measure(a, b, CodebookUse(K, num_codebooks=2)) == pytest.approx(expected, rel=1e-9)


def test_of_several_scales_each_counts_as_much_as_it_has_codes() -> None:
    a, b = draw(9, 0, (1, 5)), draw(9, 1, (1, 5), tilt=2.0)
    parts = [measure_slowly(a[..., part], b[..., part]) for part in (slice(1), slice(1, 5))]
    expected = (parts[0] + 4 * parts[1]) / 5
    assert measure(a, b, CodebookUse(K, lengths=[1, 4])) == pytest.approx(expected, rel=1e-9)


def test_mixed_sets_say_how_far_sets_of_one_distribution_are() -> None:
    code_use = CodebookUse(K)
    alike = [
        (measure(*pair, code_use), mixed_distance(*pair, code_use))
        for pair in ((draw(60, 2 * i), draw(40, 2 * i + 1)) for i in range(12))
    ]
    real, mixed = np.mean(alike, 0)
    assert mixed == pytest.approx(real, rel=0.15)
    apart = draw(60, 0), draw(40, 1, tilt=2.0)
    assert measure(*apart, code_use) > 2.5 * mixed_distance(*apart, code_use)
    assert code_use.counts.sum() == 0


def test_images_are_mixed_as_wholes_for_their_codes_depend_on_each_other() -> None:
    """Codes that are mixed one by one would make sets of images of one code each seem far closer."""
    images = [np.repeat(draw(40, seed, (1,)), 16, axis=1) for seed in (0, 1)]
    by_image = mixed_distance(*images, CodebookUse(K))
    by_code = mixed_distance(*(each.reshape(-1, 1) for each in images), CodebookUse(K))
    assert by_image > 2 * by_code
    assert measure(*images, CodebookUse(K)) == pytest.approx(by_image, rel=0.5)


def test_the_order_of_images_changes_nothing_where_many_are_the_same_either() -> None:
    a, b = draw(30, 0), draw(20, 1)
    b[5:] = b[5]  # a prior that repeats itself
    expected = mixed_distance(a, b, CodebookUse(K))
    rows = np.random.default_rng(2).permutation(20)
    assert mixed_distance(a[::-1].copy(), b[rows], CodebookUse(K)) == expected
    assert expected < measure(a, b, CodebookUse(K))


def test_sixteen_bit_codes_are_counted_like_others() -> None:
    a = draw(5, 0)
    counts = tally_codes(a.astype(np.uint16), CodebookUse(K))
    assert torch.equal(counts[0], torch.from_numpy(np.bincount(a.ravel(), minlength=K)))
