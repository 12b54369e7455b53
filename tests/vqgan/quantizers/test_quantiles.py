"""Cells of equal use, against slow versions from their definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.parts import make
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.quantiles import SAMPLES_PER_BIN, Quantiles, batch_quantiles

LEVELS = [4, 3, 2]
K = math.prod(LEVELS)


def draw_skewed(n: int) -> Tensor:
    """Vectors (n, 3) far from normal: two fifths lie in one small spot, and channels depend on each other."""
    z = torch.randn(n, 3)
    z[:, 1] += z[:, 0].square()
    z[:, 2] *= z[:, 1].abs()
    spot = torch.rand(n) < 0.4
    return torch.where(spot[:, None], -2 + 0.01 * torch.randn(n, 3), z)


def entropy_bits(indices: Tensor, K: int) -> float:
    p = torch.bincount(indices.flatten(), minlength=K).double() / indices.numel()
    return float(-torch.xlogy(p, p).sum() / math.log(2))


def slow_digits(quantiles: Quantiles, vector: Tensor) -> list[int]:
    """One after the other: how many of the thresholds that the digits before choose are exceeded."""
    digits: list[int] = []
    for c in range(len(quantiles.levels)):
        prefix = sum(d * math.prod(quantiles.levels[:i]) for i, d in enumerate(digits))
        digits.append(sum(bool(vector[c] > t) for t in quantiles.thresholds(c)[prefix]))
    return digits


def slow_quantiles(values: Tensor, level: int) -> list[float]:
    """Midway between the values on both sides of each cut of the sorted values."""
    ordered = sorted(values.tolist())
    cuts = [int(np.float32(j / level) * len(ordered)) for j in range(1, level)]
    return [(ordered[max(cut - 1, 0)] + ordered[cut]) / 2 for cut in cuts]


def test_a_digit_counts_the_thresholds_that_its_channel_exceeds_given_the_digits_before() -> None:
    quantizer = make(FSQ, None, LEVELS, activation="quantiles")
    quantizer.initialise(draw_skewed(2000))
    quantiles = quantizer.quantiles
    assert quantiles is not None
    rows = draw_skewed(50)
    indices = quantiles.indices(rows)
    for row, index in zip(rows, indices, strict=True):
        assert quantizer.to_digits(index).tolist() == slow_digits(quantiles, row)
    alone = [(rows[:, c, None] > quantiles.thresholds(c)[0]).sum(1) for c in range(3)]
    assert not torch.equal(
        quantizer.to_index(torch.stack(alone, 1)), indices
    )  # as if none mattered


def test_quantiles_of_a_batch_are_those_of_each_group() -> None:
    values, groups = torch.randn(200), torch.randint(4, (200,))
    groups[groups == 2] = 3  # one group has none
    quantiles, sizes = batch_quantiles(values, groups, 4, 5)
    for group in range(4):
        own = values[groups == group]
        assert sizes[group] == len(own)
        if len(own):
            torch.testing.assert_close(quantiles[group], torch.tensor(slow_quantiles(own, 5)))


def test_all_cells_are_used_alike_whatever_the_distribution() -> None:
    train, test = draw_skewed(60_000), draw_skewed(20_000)
    bits = {}
    for activation in ("normal", "quantiles"):
        quantizer = make(FSQ, None, [8, 8, 8], activation=activation).eval()
        quantizer.initialise(train)
        bits[activation] = entropy_bits(quantizer(test.t().reshape(1, 3, 100, 200)).indices, 512)
    assert bits["quantiles"] > 8.8
    assert bits["normal"] < 7


def test_codes_are_the_means_of_their_cells_and_those_of_empty_cells_lie_in_them() -> None:
    quantizer = make(FSQ, None, LEVELS, activation="quantiles").eval()
    z = draw_skewed(400)
    z[:, 2] = z[:, 2].clamp(max=0)  # equal values leave cells empty
    quantizer.initialise(z)
    assert quantizer.quantiles is not None
    q = quantizer(z.t()[None, :, None])
    counts = torch.bincount(q.indices.flatten(), minlength=K)
    codes = quantizer.codebooks()[0]
    for index in range(K):
        own = z[q.indices.flatten() == index]
        if len(own) > 20:  # means, but for the weight of one vector in the middle of the cell
            spread = (own.amax(0) - own.amin(0)).clamp(min=1e-3)
            assert ((codes[index] - own.mean(0)).abs() < 0.15 * spread).all()
    assert codes.isfinite().all()
    assert counts.sum() == 400


def test_an_update_moves_thresholds_and_codes_towards_those_of_the_batch_by_their_number() -> None:
    decay = 0.7
    quantizer = make(FSQ, None, LEVELS, activation="quantiles", decay=decay)
    quantizer.initialise(draw_skewed(3000))
    quantiles = quantizer.quantiles
    assert quantiles is not None
    q = quantizer(2 * draw_skewed(240).t().reshape(2, 3, 10, 12))
    before = {name: value.clone() for name, value in quantiles.state_dict().items()}
    rows = quantizer.standardise(q.z_e).movedim(1, -1).reshape(-1, 3)
    digits = quantizer.to_digits(q.indices.flatten())
    quantizer.update(q)
    for c, level in enumerate(LEVELS):
        nodes = math.prod(LEVELS[:c])
        enough = max(240 / nodes, SAMPLES_PER_BIN * level)
        for node, prefix in enumerate(itertools.product(*map(range, reversed(LEVELS[:c])))):
            chosen = (digits[:, :c] == torch.tensor(prefix[::-1], dtype=torch.int64)).all(1)
            expected = before[f"thresholds_{c}"][node]
            if chosen.any():
                target = torch.tensor(slow_quantiles(rows[chosen, c], level))
                expected = expected.lerp(target, 1 - decay ** (int(chosen.sum()) / enough))
            torch.testing.assert_close(quantiles.thresholds(c)[node], expected)
    for index in range(K):
        own = rows[q.indices.flatten() == index]
        expected = before["codes"][index]
        if len(own):
            weight = 1 - decay ** (len(own) / max(240 / K, SAMPLES_PER_BIN))
            expected = expected.lerp(own.mean(0), weight)
        torch.testing.assert_close(quantiles.codes[index], expected)


def test_thresholds_stay_in_order_and_rest_at_a_decay_of_one() -> None:
    quantizer = make(FSQ, None, LEVELS, activation="quantiles", decay=0.1)
    quantizer.initialise(draw_skewed(300))
    quantiles = quantizer.quantiles
    assert quantiles is not None
    for n in range(5):
        quantizer.update(quantizer((n + 1) * draw_skewed(48).t().reshape(1, 3, 6, 8)))
        assert all((quantiles.thresholds(c).diff() >= 0).all() for c in range(3))
    before = {name: value.clone() for name, value in quantiles.state_dict().items()}
    quantiles.decay = 1.0
    quantizer.update(quantizer(9 * draw_skewed(48).t().reshape(1, 3, 6, 8)))
    assert all(torch.equal(value, before[name]) for name, value in quantiles.state_dict().items())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_outputs_is_enough_for_a_start(n: int) -> None:
    quantizer = make(FSQ, 512, activation="quantiles")
    quantizer.initialise(torch.randn(n, 3) if n > 1 else torch.randn(2, 3))
    q = quantizer(torch.randn(1, 3, 2, 2))
    quantizer.update(q)
    assert quantizer.codebooks().isfinite().all()


def test_the_gradient_passes_straight_from_the_code_to_the_output() -> None:
    quantizer = make(FSQ, 16, activation="quantiles")
    z = torch.randn(1, 2, 4, 4, requires_grad=True)
    quantizer.initialise(torch.randn(100, 2))
    g = torch.randn(1, 2, 4, 4)
    assert torch.equal(torch.autograd.grad(quantizer(z).z_q, z, g)[0], g)
