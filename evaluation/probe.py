"""A linear probe: how well a linear classifier tells labels from given features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

MAX_FEATURES = 2048
PENALTIES = (1.0, 0.1, 0.01, 0.001)  # of the squared weights, beside the mean cross-entropy
HELD_OUT_SHARE = 0.2  # of the images, at random, which choose the penalty
MAX_ITERATIONS = 200


def pool_features(maps: Tensor, most: int = MAX_FEATURES) -> Tensor:
    """Maps (n, C, h, w) -> features (n, C * rows * columns) float32: means over cells of the finest grid, of the proportions of
    the map, that has at most so many features."""
    channels, h, w = maps.shape[1:]
    rows, columns = h, w
    while channels * rows * columns > most and rows * columns > 1:
        if columns == 1 or (rows > 1 and rows * w >= columns * h):
            rows -= 1
        else:
            columns -= 1
    return F.adaptive_avg_pool2d(maps.float(), (rows, columns)).flatten(1)


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features (n, D): softmax(weights x + bias), where x has mean 0 and spread 1 in training.

    weights (D, classes) and bias (classes,) are float64; `penalty` is that of its training.
    """

    mean: Tensor
    spread: Tensor
    weights: Tensor
    bias: Tensor
    penalty: float

    def predict(self, features: Tensor) -> Tensor:
        """The numbers of the classes (n,) int64 of features (n, D)."""
        return (standardise_by(features, self.mean, self.spread) @ self.weights + self.bias).argmax(
            1
        )


def standardise_by(features: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Features (n, D) at mean 0 and spread 1, float64; those that never change stay 0."""
    changes = spread > 1e-6 * (mean.abs() + spread)  # more than by rounding
    return torch.where(changes, (features.double() - mean) / spread, 0.0)


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, penalties: Sequence[float] = PENALTIES
) -> LinearProbe:
    """The probe that learns from features (n, D) and their labels (n,) int64 in [0, classes).

    Minimises the mean cross-entropy plus penalty / 2 times the squared weights, a convex problem, by L-BFGS. The penalty is the
    one whose probe gets most of a fifth of the images right after learning from the others; of equal ones the largest.
    """
    mean, spread = features.double().mean(0), features.double().std(0, correction=0)
    x = standardise_by(features, mean, spread)
    held_out = torch.zeros(len(x), dtype=torch.bool)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out[order[: int(HELD_OUT_SHARE * len(x))]] = True
    chosen = penalties[0]
    if len(penalties) > 1 and held_out.any():
        most, start = -1, None
        for penalty in sorted(penalties, reverse=True):
            start = minimise_loss(x[~held_out], labels[~held_out], classes, penalty, start)
            right = int((linear_logits(start, x[held_out]).argmax(1) == labels[held_out]).sum())
            if right > most:
                most, chosen = right, penalty
    solution = minimise_loss(x, labels, classes, chosen)
    return LinearProbe(mean, spread, solution[:-1], solution[-1], chosen)


def linear_logits(solution: Tensor, x: Tensor) -> Tensor:
    """Logits (n, classes) of features x (n, D) by weights with the bias as their last row, (D + 1, classes)."""
    return x @ solution[:-1] + solution[-1]


def minimise_loss(
    x: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None = None
) -> Tensor:
    """The weights with the bias as their last row, (D + 1, classes) float64, of the least loss on x (n, D)."""
    shape = (x.shape[1] + 1, classes)
    targets = F.one_hot(labels, classes).double()

    def loss_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        solution = torch.from_numpy(flat).view(shape)
        log_p = linear_logits(solution, x).log_softmax(1)
        loss = -(targets * log_p).sum(1).mean() + penalty / 2 * solution[:-1].square().sum()
        errors = (log_p.exp() - targets) / len(x)
        gradient = torch.cat([x.t() @ errors + penalty * solution[:-1], errors.sum(0)[None]])
        return float(loss), gradient.flatten().numpy()

    first = torch.zeros(shape, dtype=torch.float64) if start is None else start
    result = minimize(
        loss_and_gradient,
        first.flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_ITERATIONS, "gtol": 1e-6, "ftol": 1e-10},
    )
    flat: NDArray[np.float64] = result.x
    return torch.from_numpy(flat).view(shape)
