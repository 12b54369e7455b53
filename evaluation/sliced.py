"""MIND: the sliced Wasserstein distance between two sets of features, and its standard error."""

import math

import torch
from torch import Tensor

from codegrid.evaluation.intervals import Estimate

MIND_DIRECTIONS = 1000
MIND_SEED = 2020  # of the directions
PROJECTIONS_AT_ONCE = 2**20  # numbers; their computation takes some 60 MB


def mind(
    a: Tensor,
    b: Tensor,
    directions: int = MIND_DIRECTIONS,
    seed: int = MIND_SEED,
    paired: bool = False,
) -> Estimate:
    """3 D times the mean over random directions of the squared Wasserstein distance between the projections of a (n, D) and of
    b (m, D) (Berthet et al. 2026, MIND: Monge Inception Distance).

    The directions are those of torch-fidelity. On a line the best transport pairs sorted values; sets of different sizes are
    compared by their quantile functions, so no image is left out. Like the Fréchet distance it is biased upward for few images.

    The standard error is the bootstrap's for the linear part of the distance, in closed form (the infinitesimal jackknife, Efron
    1982, section 6.1): an image weighs in by its Kantorovich potential, which is the derivative of the transport cost by its
    weight. Replicates of the distance itself would lie above it, as sets drawn with replacement have fewer different images.
    `paired` means that b[i] was computed from a[i], as a reconstruction is: both are drawn together.
    """
    n, m = len(a), len(b)
    factor = 3 * a.shape[1] / directions
    a, b = a.double(), b.double()
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    weights_a, weights_b = a.new_zeros(n), b.new_zeros(m)
    slices = draw_directions(a.shape[1], directions, seed).to(a.device)
    for part in slices.split(max(1, PROJECTIONS_AT_ONCE // (n + m))):
        x, places_x = (a @ part.t()).t().sort()
        y, places_y = (b @ part.t()).t().sort()
        total += transport_costs(x, y).sum()
        weights_a.index_add_(0, places_x.flatten(), factor * potentials(x, y).flatten())
        weights_b.index_add_(0, places_y.flatten(), factor * potentials(y, x).flatten())
    if paired:
        variance = (weights_a + weights_b).var() / n
    else:
        variance = weights_a.var() / n + weights_b.var() / m
    return Estimate(float(factor * total), math.sqrt(variance))


def draw_directions(D: int, n: int, seed: int) -> Tensor:
    """n unit vectors, uniform on the sphere, (n, D) float64; those that torch-fidelity draws in float32."""
    directions = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return (directions / directions.norm(dim=1, keepdim=True)).double()


def transport_costs(x: Tensor, y: Tensor) -> Tensor:
    """The squared 2-Wasserstein distances (c,) of c pairs of sets on a line, sorted x (c, n) and y (c, m)."""
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return (x - y).square().mean(1)
    # In units of 1 / (n m): where a step of either quantile function ends.
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([steps.new_zeros(1), steps[:-1]])
    shares = (steps - starts).double().to(x.device) / (n * m)
    return (x[:, starts // m] - y[:, starts // n]).square() @ shares


def potentials(x: Tensor, y: Tensor) -> Tensor:
    """The Kantorovich potentials (c, n), of mean 0, of sorted points x (c, n) that are transported to sorted y (c, m).

    Between two neighbours in x the potential rises by the integral of 2 (t - T(t)), where T leads to the quantile of y that is
    as far up as they are; between two of y, in the middle.
    """
    n, m = x.shape[1], y.shape[1]
    below = torch.arange(1, n, device=x.device)  # how many of x lie below each gap
    first = (below * m + n - 1) // n - 1
    second = below * m // n
    left, right = x[:, :-1], x[:, 1:]
    rises = (right - left) * ((right - y[:, first]) + (left - y[:, second]))
    values = torch.cat([torch.zeros_like(x[:, :1]), rises.cumsum(1)], 1)
    return values - values.mean(1, keepdim=True)
