"""Precision and recall as ADM's evaluator computes them, in half precision."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from codegrid.evaluation.distances import ENTRIES_AT_ONCE

MANIFOLD_BLOCK = 10_000  # rows of both sets that the evaluator compares in one precision
SAFE_NORM = 16_000.0  # from squared norms up to this no sum of a distance exceeds float16's 65,504


def measure_manifolds(reference: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1-2) of features (n, D) and (m, D), as ADM's evaluator has them.

    The evaluator measures squared distances in float16, or in float32 for a block of 10,000 x 10,000 in which one is not finite.
    The radius of a point is the (k + 1)-th smallest distance in its row; its own, which is 0 but for rounding, is one of them. Here
    norms and products are summed in float32 and then rounded to float16, as GPUs do; TensorFlow leaves its sums to the device.
    """
    radii_of_reference, radii_of_samples = (
        measure_radii(features, k) for features in (reference, samples)
    )
    is_recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    is_precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for first in range(0, len(reference), MANIFOLD_BLOCK):
        u = reference[first : first + MANIFOLD_BLOCK]
        for start in range(0, len(samples), MANIFOLD_BLOCK):
            columns = slice(start, start + MANIFOLD_BLOCK)
            v = samples[columns]
            for row, distances in iterate_distances(u, v):
                rows = slice(first + row, first + row + len(distances))
                is_recalled[rows] |= (distances <= radii_of_samples[columns]).any(1)
                is_precise[columns] |= (distances <= radii_of_reference[rows, None]).any(0)
    return float(is_precise.double().mean()), float(is_recalled.double().mean())


def measure_radii(features: Tensor, k: int) -> Tensor:
    """The squared radii (n,) of the balls about features (n, D)."""
    radii = []
    for rows in features.split(MANIFOLD_BLOCK):
        nearest: Tensor | None = None
        for columns in features.split(MANIFOLD_BLOCK):
            few = min(k + 1, len(columns))
            parts = [
                distances.topk(few, largest=False).values
                for _, distances in iterate_distances(rows, columns)
            ]
            candidates = torch.cat(parts)
            if nearest is not None:
                candidates = torch.cat([nearest, candidates], 1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values
        assert nearest is not None
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def iterate_distances(u: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The squared distances of a block, (n, D) and (m, D), some rows at a time: the first row's number, and float32 (rows, m)."""
    rows = max(1, ENTRIES_AT_ONCE // len(v))
    measure: Callable[[Tensor, Tensor], Tensor] = half_distances
    largest = max(float(x.float().square().sum(1).max()) for x in (u, v))
    if not largest <= SAFE_NORM:
        parts = (half_distances(part, v) for part in u.split(rows))
        if not all(bool(part.isfinite().all()) for part in parts):
            measure = single_distances
    for first in range(0, len(u), rows):
        yield first, measure(u[first : first + rows], v)


def half_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances (n, m) float32 with the values that float16 arithmetic has; some may be infinite or NaN."""
    u, v = u.half(), v.half()
    # Sums in float32, since CPUs sum float16 in many ways; each result is rounded to float16.
    norm_u, norm_v = (x.square().float().sum(1).half() for x in (u, v))
    product = (u.float() @ v.float().t()).half()
    return (norm_u[:, None] - 2 * product + norm_v).clamp(min=0).float()


def single_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances (n, m) in float32."""
    u, v = u.float(), v.float()
    norm_u, norm_v = (x.square().sum(1) for x in (u, v))
    return (norm_u[:, None] - 2 * (u @ v.t()) + norm_v).clamp(min=0)
