"""From logits to frequencies: whole numbers that small differences of the logits don't change."""

import math
from itertools import pairwise

import numpy as np
import pytest

from codegrid.engine.errors import InputError
from prior.coding.coder import CodeWriter
from prior.coding.frequencies import (
    LOGIT_STEP,
    PHASES,
    TOP_WEIGHT,
    TOTAL_FREQUENCY,
    IntArray,
    LogitArray,
    choose_phase,
    scale_logits,
    share_out,
    weigh,
    weight_table,
)


def draw_logits(T: int, K: int, spread: float = 3.0) -> LogitArray:
    return np.random.default_rng(0).normal(0, spread, (T, K))


def round_logits(logits: LogitArray, phase: int) -> IntArray:
    return weigh(scale_logits(logits), phase)


def test_weights_are_exponentials_rounded_to_whole_numbers() -> None:
    table = weight_table()
    exact = [TOP_WEIGHT * math.exp(-LOGIT_STEP * d) for d in range(len(table))]
    assert np.abs(table - exact).max() <= 0.5 + 1e-6
    assert table[0] == TOP_WEIGHT
    assert table[-1] == 1
    assert (np.diff(table) <= 0).all()


@pytest.mark.parametrize("D", [2, 3, 64, 1024])
def test_frequencies_add_up_and_none_is_zero(D: int) -> None:
    weights = np.random.default_rng(0).integers(1, TOP_WEIGHT, (50, D)) ** 2 >> 20
    frequencies = share_out(np.maximum(weights, 1)) + 1
    assert (frequencies.sum(1) == TOTAL_FREQUENCY).all()
    assert frequencies.min() >= 1


def test_frequencies_are_those_of_exact_fractions() -> None:
    """Against Python's whole numbers, which know no overflow."""
    weights = np.array([[3, 5, 1, 2**27], [2**28, 2**28, 1, 7]])
    for row, shared in zip(weights.tolist(), share_out(weights).tolist(), strict=True):
        ends = [sum(row[: i + 1]) * (TOTAL_FREQUENCY - 4) // sum(row) for i in range(4)]
        assert shared == [end - begin for begin, end in pairwise([0, *ends])]


@pytest.mark.parametrize(("K", "spread"), [(3, 1.0), (512, 3.0), (1500, 2.0), (20_000, 1.0)])
def test_rounding_costs_less_than_a_thousandth(K: int, spread: float) -> None:
    logits = draw_logits(40, K, spread)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rng = np.random.default_rng(1)
    codes = np.array([rng.choice(K, p=np.exp(row)) for row in logp])
    phase, _ = choose_phase(scale_logits(logits))
    claimed = -logp[np.arange(40), codes].sum() / math.log(2)
    writer = CodeWriter()
    writer.write(codes, round_logits(logits, phase))
    assert writer.bits == pytest.approx(claimed, rel=1e-3)


@pytest.mark.parametrize("K", [2, 300, 5000])
def test_differences_below_the_margin_change_no_weight(K: int) -> None:
    logits = draw_logits(20, K)
    phase, margin = choose_phase(scale_logits(logits))
    weights = round_logits(logits, phase)
    rng = np.random.default_rng(1)
    for _ in range(5):
        noise = rng.choice([-1.0, 1.0], logits.shape) * margin * 0.99
        assert np.array_equal(round_logits(logits + noise, phase), weights)
    assert margin > 1e-8, "some 1e5 times as much as passes in float64 differ by"


def test_without_a_chosen_phase_the_same_differences_change_weights() -> None:
    logits = draw_logits(20, 5000)
    _, margin = choose_phase(scale_logits(logits))
    parts = scale_logits(logits)[0, 0] % 1
    unlucky = int(parts * PHASES)  # right at a logit
    changed = [
        round_logits(logits + sign * margin, unlucky) != round_logits(logits, unlucky)
        for sign in (-1, 1)
    ]
    assert np.any(changed)


def test_logits_that_are_all_alike_leave_the_widest_margin() -> None:
    phase, margin = choose_phase(scale_logits(np.full((4, 7), -1.25)))
    assert margin == pytest.approx(LOGIT_STEP / 2, rel=1e-3)
    assert (round_logits(np.full((4, 7), -1.25), phase) == TOP_WEIGHT).all()


def test_impossible_codes_have_the_least_weight_and_narrow_no_margin() -> None:
    logits = np.array([[0.0, 1.0, -np.inf, -1e9]])
    phase, margin = choose_phase(scale_logits(logits))
    assert round_logits(logits, phase)[0, 2:].tolist() == [1, 1]
    assert margin == choose_phase(scale_logits(logits[:, :2]))[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="the prior's logits are NaN or infinite"):
        scale_logits(np.full((2, 3), value))
