"""Scores of two sets of images, as functions of their features (n, D): computed in float64, a part of the rows at a time."""

import numpy as np
import torch
from torch import Tensor

ROWS = 4096  # at once

ENTRIES = 2**24  # of a matrix of distances at once


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) with the covariances A, B (Heusel et al. 2017, section 2).

    The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, a symmetric matrix: where a
    covariance lacks rank, those of A B come out complex.
    """
    (mean_a, A), (mean_b, B) = moments(a), moments(b)
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mean_a - mean_b).square().sum() + A.trace() + B.trace() - 2 * cross))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64."""
    mean = torch.stack([part.double().sum(0) for part in x.split(ROWS)]).sum(0) / len(x)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(ROWS):
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
    """The unbiased squared MMD with the kernel (x y / D + 1)^3, the mean over random subsets (Binkowski et al. 2018, section 4).

    It may be a little below 0. The subsets are those of torch-fidelity; of sets that are no larger than one they are the
    sets themselves. Where b[i] was made of a[i], as a reconstruction is, say `paired`: both subsets are of the same i, and
    what an image has in common with its own reconstruction is left out (Gretton et al. 2012, eq. 4). Of n images it would
    else lower the score by about 2 / n of the kernel, which makes poor reconstructions of a few hundred look perfect.
    """
    size = min(size, len(a), len(b))
    random, found = np.random.RandomState(seed), []
    for _ in range(subsets if size < max(len(a), len(b)) else 1):
        mine = random.choice(len(a), size, replace=False)
        others = mine if paired else random.choice(len(b), size, replace=False)
        x, y = (
            rows[torch.from_numpy(some).to(rows.device)].double()
            for rows, some in ((a, mine), (b, others))
        )
        within = sum(float(off_diagonal(kernel(z, z))) for z in (x, y))
        found.append(
            within - 2 * float(off_diagonal(kernel(x, y)) if paired else kernel(x, y).mean())
        )
    return sum(found) / len(found)


def off_diagonal(matrix: Tensor) -> Tensor:
    """The mean of a square matrix without its diagonal."""
    return (matrix.sum() - matrix.diagonal().sum()) / (len(matrix) * (len(matrix) - 1))


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return (x @ y.t() / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> float:
    """exp(mean KL(p(y|x) || p(y))) of class logits (n, classes), the mean over `splits` parts (Salimans et al. 2016, section 4)."""
    n, found = len(logits), []
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)
    for i in range(splits):
        log_p = logits[order[i * n // splits : (i + 1) * n // splits]].double().log_softmax(1)
        p = log_p.exp()
        found.append(
            float((p * (log_p - p.mean(0).log())).nansum(1).mean().exp())
        )  # 0 * (-inf - -inf) is 0
    return sum(found) / splits


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of fakes that lie within reals' balls, and of reals within fakes' (Kynkäänniemi et al. 2019, eq. 1-2).

    A point's ball reaches to its k-th nearest neighbour in its own set.
    """
    within_real, _ = balls(fake, real, k)
    within_fake, _ = balls(real, fake, k)
    return float((within_real > 0).double().mean()), float((within_fake > 0).double().mean())


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """How many reals' balls a fake lies in, over k, and the share of reals whose ball holds a fake (Naeem et al. 2020, eq. 3-4).

    Density is 1 in expectation where both are of one distribution, and has no upper bound.
    """
    within, holding = balls(fake, real, k)
    return float(within.double().mean()) / k, float((holding > 0).double().mean())


def balls(points: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many centres' balls each point (n, D) lies in (n,), and how many points each centre's ball holds (m,).

    The ball of a centre (m, D) reaches to the k-th nearest other centre, its border belongs to it.
    """
    middle = centres.double().mean(
        0
    )  # or far from the origin a distance would be a small difference of large numbers
    points, centres = points.double() - middle, centres.double() - middle
    slack = 1e-12 * max(
        float(x.square().sum(1).max()) for x in (points, centres)
    )  # rounding must not push a point out
    part = max(1, ENTRIES // len(centres))
    reach = (
        torch.cat([squares(some, centres).kthvalue(k + 1).values for some in centres.split(part)])
        + slack
    )
    within, holding = [], torch.zeros(len(centres), dtype=torch.int64, device=centres.device)
    for some in points.split(part):
        inside = squares(some, centres) <= reach
        within.append(inside.sum(1))
        holding += inside.sum(0)
    return torch.cat(within), holding


def squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances, (n, D), (m, D) -> (n, m)."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.t()).clamp(min=0)
