"""Logits as whole numbers: the frequencies of an entropy coder, equal to the last unit wherever a file is written and read.

Two passes through a network never agree to the last bit: batches, threads, caches and processors sum in other orders. In float64
their logits differ by some 1e-13. They are rounded down to steps of LOGIT_STEP, and from there on everything is whole numbers. A
logit at the boundary of a step, to within that difference, would still be rounded either way. So the writer of a file shifts the
boundaries by a `phase` for which there is none: to the middle of the widest gap between all logits of the image, modulo LOGIT_STEP.
"""

from decimal import Context, Decimal
from functools import cache

import numpy as np
from numpy.typing import NDArray

from codegrid.engine.errors import InputError

LogitArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LOGIT_STEP = 2.0**-6  # nats to which logits are rounded; costs about LOGIT_STEP**2 / 24 nats a code
TOP_WEIGHT = 2**28  # weight of a code whose logit is the highest
TOTAL_FREQUENCY = 2**24  # the sum of all frequencies, and what constriction has
PHASES = 2**32  # phases are whole numbers below it, in units of LOGIT_STEP / PHASES
MAX_SYMBOLS = 1024  # codes that one symbol tells apart; more are two symbols
SUM_BITS = 38  # of weights, whose product with TOTAL_FREQUENCY has to fit into 63 bits


@cache
def weight_table() -> IntArray:
    """The weight of a code whose logit is d steps below the highest, TOP_WEIGHT * exp(-LOGIT_STEP * d), at least 1; up to the first
    d with weight 1."""
    context = Context(prec=40)
    weights = [TOP_WEIGHT]
    while weights[-1] > 1:
        power = context.exp(Decimal(-len(weights)) * Decimal(LOGIT_STEP))
        weights.append(max(1, round(power * TOP_WEIGHT)))
    return np.array(weights, dtype=np.int64)


def scale_logits(logits: LogitArray) -> LogitArray:
    """Logits (..., K) in steps. Those with the least weight are cut off, since they have it wherever they lie."""
    scaled = np.asarray(logits, dtype=np.float64) / LOGIT_STEP
    highest = scaled.max(-1, keepdims=True)
    if not np.isfinite(highest).all():
        raise InputError(
            "the prior's logits are NaN or infinite, so no file can be coded under it; check its training run"
        )
    return np.maximum(scaled, highest - (len(weight_table()) + 1))


def choose_phase(scaled: LogitArray) -> tuple[int, float]:
    """The phase that keeps the scaled logits (T, K) of an image farthest from where rounding changes, and that distance in nats."""
    highest = scaled.max(-1, keepdims=True)
    parts = scaled[scaled >= highest - len(weight_table())]
    parts -= np.floor(parts)
    bins = 2 ** max(16, int(parts.size).bit_length() + 1)
    is_taken = np.zeros(bins, dtype=bool)
    is_taken[np.minimum((parts * bins).astype(np.int64), bins - 1)] = True
    taken = np.flatnonzero(is_taken)
    gaps = np.diff(taken, append=taken[0] + bins) - 1  # free bins after each
    widest = int(gaps.argmax())
    start, width = int(taken[widest]) + 1, int(gaps[widest])
    phase = (2 * start + width) * (PHASES // 2) // bins % PHASES
    margin = width / (2 * bins) - 1 / PHASES
    return phase, max(margin, 0.0) * LOGIT_STEP


def weigh(scaled: LogitArray, phase: int | IntArray) -> IntArray:
    """Scaled logits (..., K) -> weights of the codes, whole numbers from 1 to TOP_WEIGHT; phases may be (..., 1)."""
    levels = np.floor(scaled - phase / PHASES).astype(np.int64)
    table = weight_table()
    return table[np.minimum(levels.max(-1, keepdims=True) - levels, len(table) - 1)]


def share_out(weights: IntArray) -> IntArray:
    """Weights (m, D) -> by how much each symbol's frequency exceeds 1, in proportion to them; together TOTAL_FREQUENCY - D."""
    _, bits = np.frexp(weights.sum(1, keepdims=True).astype(np.float64))
    cumulated = (weights >> np.maximum(bits.astype(np.int64) - SUM_BITS, 0)).cumsum(1)
    shared: IntArray = cumulated * (TOTAL_FREQUENCY - weights.shape[1]) // cumulated[:, -1:]
    return np.diff(shared, prepend=0)


def digit_base(K: int) -> int:
    """How many values each symbol of a code has: K, or a power of two whose square is at least K."""
    return K if K <= MAX_SYMBOLS else 2 ** -(-(K - 1).bit_length() // 2)


def group_weights(weights: IntArray) -> IntArray:
    """Weights (m, K) of codes -> (m, base, base): of each value of the first symbol, of each of the second; 0 beyond K."""
    base = digit_base(weights.shape[1])
    padded = np.pad(weights, ((0, 0), (0, base**2 - weights.shape[1])))
    return padded.reshape(len(weights), base, base)
