"""Distances between two sets of images, as functions of their features (n, D).

Computed in float64, a part of the rows at a time.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from codegrid.evaluation.intervals import Estimate, jackknife_variance

ROWS_AT_ONCE = 4096
ENTRIES_AT_ONCE = 2**24  # of a matrix of pairwise distances

Moments = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D), float64


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two sets of features (n, D) and (m, D)."""
    return frechet_of_moments(moments(a), moments(b))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) with the covariances A, B (Heusel et al. 2017, section 2).

    The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, a symmetric matrix. The eigenvalues
    of A B itself come out complex if a covariance lacks rank.
    """
    (mean_a, A), (mean_b, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + A.trace() + B.trace() - 2 * cross
    return float(distance.clamp(min=0))  # max(0.0, nan) would be 0


def moments(x: Tensor) -> Moments:
    """Mean (D,) and unbiased covariance (D, D) of x (n, D), float64."""
    mean = torch.stack([part.double().sum(0) for part in x.split(ROWS_AT_ONCE)]).sum(0) / len(x)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(ROWS_AT_ONCE):
        centred = part.double() - mean
        scatter += centred.t() @ centred
    return mean, scatter / (len(x) - 1)


def kid(
    a: Tensor,
    b: Tensor,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    paired: bool = False,
) -> float:
    """The squared MMD of `estimate_kid`, without its error."""
    return estimate_kid(a, b, subsets, size, seed, paired).value


def estimate_kid(
    a: Tensor,
    b: Tensor,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    paired: bool = False,
) -> Estimate:
    """The unbiased squared MMD with the kernel (x y / D + 1)^3, mean over random subsets (Binkowski et al. 2018, section 4).

    It may be slightly negative. The subsets are those of torch-fidelity; sets no larger than one subset are used whole.
    `paired` means that b[i] was computed from a[i], as a reconstruction is: both subsets then hold the same i, and the
    similarity of an image to its own reconstruction is left out (Gretton et al. 2012, eq. 4). With n images it would lower
    the score by about 2 / n of the kernel, which makes poor reconstructions of a few hundred images look perfect.

    The standard error is the jackknife's over images: of a subset, scaled to all images, for the variance falls as one over
    their number; plus what the choice of the subsets adds. Subsets overlap, so the spread of their values alone says little.
    """
    size = min(size, len(a), len(b))
    random = np.random.RandomState(seed)
    estimates, variances = [], []
    for _ in range(subsets if size < max(len(a), len(b)) else 1):
        rows_a = random.choice(len(a), size, replace=False)
        rows_b = rows_a if paired else random.choice(len(b), size, replace=False)
        x = a[torch.from_numpy(rows_a).to(a.device)].double()
        y = b[torch.from_numpy(rows_b).to(b.device)].double()
        kernels = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
        within = float(off_diagonal_mean(kernels[0])) + float(off_diagonal_mean(kernels[1]))
        across = kernels[2]
        estimates.append(within - 2 * float(off_diagonal_mean(across) if paired else across.mean()))
        variances.append(mmd_variance(*kernels, size / len(a), size / len(b), paired))
    variance = sum(variances) / len(variances)
    if len(estimates) > 1:
        variance += float(np.var(estimates, ddof=1)) / len(estimates)
    return Estimate(sum(estimates) / len(estimates), math.sqrt(variance))


def mmd_variance(
    kernel_a: Tensor, kernel_b: Tensor, across: Tensor, share_a: float, share_b: float, paired: bool
) -> float:
    """The jackknife's variance of the squared MMD, from the kernels (n, n) within and across two sets.

    The sets are these shares of all images, whose variance is as much smaller. NaN for fewer than 3 images.
    """
    n = len(kernel_a)
    if n < 3:
        return math.nan
    rows_a, rows_b = (k.sum(1) - k.diagonal() for k in (kernel_a, kernel_b))
    pairs = (n - 1) * (n - 2)
    # An image is in its row and in its column, so without it a sum over pairs lacks both.
    without_a = (rows_a.sum() - 2 * rows_a) / pairs
    without_b = (rows_b.sum() - 2 * rows_b) / pairs
    if paired:
        rows = across.sum(1) + across.sum(0) - 2 * across.diagonal()
        without = (across.sum() - across.diagonal().sum() - rows) / pairs
        return share_a * jackknife_variance(without_a + without_b - 2 * without)
    total = across.sum()
    without_a -= 2 * (total - across.sum(1)) / ((n - 1) * n)
    without_b -= 2 * (total - across.sum(0)) / ((n - 1) * n)
    return share_a * jackknife_variance(without_a) + share_b * jackknife_variance(without_b)


def off_diagonal_mean(matrix: Tensor) -> Tensor:
    """The mean of a square matrix without its diagonal."""
    return (matrix.sum() - matrix.diagonal().sum()) / (len(matrix) * (len(matrix) - 1))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return (x @ y.t() / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> float:
    """exp(mean KL(p(y|x) || p(y))) of class logits (n, classes), mean over `splits` parts (Salimans et al. 2016, section 4)."""
    n = len(logits)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)
    scores = []
    for first, end in pairwise(i * n // splits for i in range(splits + 1)):
        scores.append(score_part(logits[order[first:end]]))
    return sum(scores) / splits


def score_part(logits: Tensor) -> float:
    """exp(mean KL(p(y|x) || p(y))) of class logits (n, classes)."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    divergence = (p * (log_p - p.mean(0).log())).masked_fill(p == 0, 0).sum(1)  # 0 log 0 = 0
    return float(divergence.mean().exp())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of fakes within the balls of reals, and of reals within those of fakes (Kynkäänniemi et al. 2019, eq. 1-2).

    The ball of a point reaches to its k-th nearest neighbour in its own set.
    """
    balls_per_fake, _ = count_in_balls(fake, real, k)
    balls_per_real, _ = count_in_balls(real, fake, k)
    precision = float((balls_per_fake > 0).double().mean())
    recall = float((balls_per_real > 0).double().mean())
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """How many balls of reals hold a fake, divided by k, and the share of reals whose ball holds a fake.

    Naeem et al. 2020, eq. 3-4. Density is 1 in expectation if both sets have one distribution, and has no upper bound.
    """
    balls_per_fake, fakes_per_ball = count_in_balls(fake, real, k)
    density = float(balls_per_fake.double().mean()) / k
    coverage = float((fakes_per_ball > 0).double().mean())
    return density, coverage


def count_in_balls(points: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The number of balls that each point (n, D) lies in (n,), and of points that each centre's ball holds (m,).

    The ball of a centre (m, D) reaches to the k-th nearest other centre and includes its border.
    """
    # Far from the origin, a squared distance would be a small difference of large numbers.
    middle = centres.double().mean(0)
    points = points.double() - middle
    centres = centres.double() - middle
    # Rounding must not push a point on the border out of a ball.
    slack = 1e-12 * max(float(x.square().sum(1).max()) for x in (points, centres))
    chunk = max(1, ENTRIES_AT_ONCE // len(centres))
    radii = [squared_distances(c, centres).kthvalue(k + 1).values for c in centres.split(chunk)]
    reach = torch.cat(radii) + slack
    balls_per_point = []
    points_per_ball = torch.zeros(len(centres), dtype=torch.int64, device=centres.device)
    for part in points.split(chunk):
        inside = squared_distances(part, centres) <= reach
        balls_per_point.append(inside.sum(1))
        points_per_ball += inside.sum(0)
    return torch.cat(balls_per_point), points_per_ball


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.t()).clamp(min=0)
