"""Precision and recall in half precision."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.evaluation.adm.manifold import half_distances, measure_manifolds
from codegrid.evaluation.distances import precision_recall

HALF = np.float16


def clouds(n: int = 40, m: int = 30, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overlapping clouds of positive features, as those of a ReLU."""
    spread = torch.randn(6, 6)
    return (torch.randn(n, 6) @ spread).relu() * scale, (
        torch.randn(m, 6) @ spread + 0.5
    ).relu() * scale


def distances_one_by_one(u: Tensor, v: Tensor) -> NDArray[np.float32]:
    """The squared distance of each pair by numpy's float16, one operation after the other."""
    table = np.zeros((len(u), len(v)), np.float32)
    a, b = u.numpy().astype(HALF), v.numpy().astype(HALF)
    for i, x in enumerate(a):
        norm_x = HALF(np.sum((x * x).astype(np.float32)))
        for j, y in enumerate(b):
            norm_y = HALF(np.sum((y * y).astype(np.float32)))
            product = HALF(np.dot(x.astype(np.float32), y.astype(np.float32)))
            distance = HALF(HALF(norm_x - HALF(HALF(2) * product)) + norm_y)
            table[i, j] = max(distance, HALF(0))
    return table


def manifolds_one_by_one(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall by the whole tables of distances."""
    reach_of_reference, reach_of_samples = (
        np.sort(distances_one_by_one(x, x), axis=1)[:, k] for x in (reference, samples)
    )
    table = distances_one_by_one(reference, samples)
    precision = (table <= reach_of_reference[:, None]).any(0).mean()
    recall = (table <= reach_of_samples[None]).any(1).mean()
    return float(precision), float(recall)


def test_distances_are_numpys_in_float16() -> None:
    reference, samples = clouds(15, 12)
    ours = half_distances(reference, samples).numpy()
    np.testing.assert_array_equal(ours, distances_one_by_one(reference, samples))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_numpys_float16(k: int) -> None:
    reference, samples = clouds()
    expected = manifolds_one_by_one(reference, samples, k)
    assert measure_manifolds(reference, samples, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1


def test_where_a_distance_is_infinite_they_are_torch_fidelitys_in_float32() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    reference, samples = clouds(scale=100)
    assert not half_distances(reference, samples).isfinite().all()
    theirs = prc.calculate_precision_recall_full(samples, reference, 3)
    assert measure_manifolds(reference, samples, 3) == pytest.approx(theirs)
    assert measure_manifolds(reference, samples, 3) == pytest.approx(
        precision_recall(reference, samples, 3)
    )


def test_float16_counts_a_near_miss_and_float32_does_not() -> None:
    """The rounding is part of the evaluator's definition: it is not the same as exact distances."""
    reference = torch.tensor([[100.0], [101.0], [102.0], [103.0], [104.0]])
    samples = torch.tensor([[106.01], [50.0], [20.0], [10.0]])
    assert precision_recall(reference, samples, 2)[0] == 0
    assert measure_manifolds(reference, samples, 2)[0] == 0.25


def test_blocks_have_the_precision_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite distance in one block leaves the others in float16."""
    reference, samples = clouds(12, 12)
    samples[7] *= 1000
    whole = measure_manifolds(reference, samples, 3)
    monkeypatch.setattr("codegrid.evaluation.adm.manifold.MANIFOLD_BLOCK", 6)
    calls = []

    def note(u: Tensor, v: Tensor) -> Tensor:
        calls.append((len(u), len(v)))
        return (u[:, None] - v).square().sum(2)

    monkeypatch.setattr("codegrid.evaluation.adm.manifold.single_distances", note)
    parts = measure_manifolds(reference, samples, 3)
    # Of the samples' four blocks three meet the large one, and of reference against samples two.
    assert calls == [(6, 6)] * 5
    assert parts == pytest.approx(whole, abs=0.2)


@pytest.mark.parametrize(("block", "entries"), [(7, 2**24), (10_000, 40), (9, 1)])
def test_neither_blocks_nor_parts_of_their_rows_change_a_result(
    monkeypatch: pytest.MonkeyPatch, block: int, entries: int
) -> None:
    reference, samples = clouds()
    whole = measure_manifolds(reference, samples, 3)
    monkeypatch.setattr("codegrid.evaluation.adm.manifold.MANIFOLD_BLOCK", block)
    monkeypatch.setattr("codegrid.evaluation.adm.manifold.ENTRIES_AT_ONCE", entries)
    assert measure_manifolds(reference, samples, 3) == whole


def test_the_order_of_images_does_not_matter() -> None:
    reference, samples = clouds()
    order, other = torch.randperm(len(reference)), torch.randperm(len(samples))
    assert measure_manifolds(reference, samples) == measure_manifolds(
        reference[order], samples[other]
    )


def test_equal_sets_have_precision_and_recall_1_and_distant_ones_0() -> None:
    reference, samples = clouds()
    assert measure_manifolds(reference, reference) == (1, 1)
    assert measure_manifolds(reference, samples + 50) == (0, 0)
