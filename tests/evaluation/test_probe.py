"""The linear probe against plain gradient descent, and by identities."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.evaluation.probe import fit_probe, pool_features


def draw(n: int, D: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping clouds of features at different scales, and their labels."""
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(1))
    scales = torch.logspace(-2, 3, D)
    return (centres[labels] + torch.randn(n, D)) * scales + 7, labels


def test_the_weights_are_those_of_a_slow_descent() -> None:
    features, labels = draw(40)
    probe = fit_probe(features, labels, 3, penalties=[0.1])
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weights = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights, bias], lr=0.5)
    for _ in range(600):
        loss = F.cross_entropy(x @ weights + bias, labels) + 0.05 * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(probe.weights, weights.detach(), atol=1e-4, rtol=1e-3)
    expected = (x @ weights + bias).argmax(1)
    assert torch.equal(probe.predict(features), expected)


def test_separated_classes_are_learned_and_random_labels_are_not() -> None:
    features, labels = draw(300)
    apart = features + 1e4 * F.one_hot(labels, 5)
    probe = fit_probe(apart[:200], labels[:200], 3)
    assert (probe.predict(apart[200:]) == labels[200:]).all()
    random = torch.randint(3, (300,))
    probe = fit_probe(features[:200], random[:200], 3)
    right = float((probe.predict(features[200:]) == random[200:]).double().mean())
    assert right == pytest.approx(1 / 3, abs=0.15)


def test_the_penalty_is_small_where_weights_must_be_large_and_large_among_noise() -> None:
    labels = torch.arange(100) % 2
    base = torch.randn(100)
    difference = torch.stack(
        [base, base + 0.1 * (labels - 0.5)], 1
    )  # of two features that are nearly the same
    probe = fit_probe(difference, labels, 2)
    assert probe.penalty <= 0.01
    assert (probe.predict(difference) == labels).double().mean() > 0.95
    noisy = torch.cat([labels[:, None] + torch.randn(100, 1), torch.randn(100, 300)], 1)
    assert fit_probe(noisy, labels, 2).penalty > probe.penalty


def test_the_unit_of_a_feature_and_a_feature_that_never_changes_do_not_matter() -> None:
    features, labels = draw(80)
    expected = fit_probe(features, labels, 3).predict(features)
    changed = torch.cat(
        [features * torch.tensor([1e3, 1, 1, 1e-3, 1]), torch.full((80, 1), 5.0)], 1
    )
    probe = fit_probe(changed, labels, 3)
    assert torch.equal(probe.predict(changed), expected)
    new = torch.cat([changed[:, :5], torch.full((80, 1), 6.0)], 1)  # nothing was learned of it
    assert torch.equal(probe.predict(new), expected)


def test_a_class_without_training_images_is_never_predicted() -> None:
    features, labels = draw(60)
    assert fit_probe(features, labels, 5).predict(features).max() == 2


@pytest.mark.parametrize(
    ("shape", "most", "pooled"),
    [
        ((3, 8, 8), 192, (8, 8)),
        ((3, 8, 8), 48, (4, 4)),
        ((3, 8, 4), 24, (4, 2)),
        ((16, 1, 10), 80, (1, 5)),
        ((100, 4, 4), 50, (1, 1)),  # no fewer than the channels
    ],
)
def test_maps_become_means_over_cells_of_the_finest_grid_that_fits(
    shape: tuple[int, int, int], most: int, pooled: tuple[int, int]
) -> None:
    maps = torch.randn(2, *shape)
    features = pool_features(maps, most).view(2, shape[0], *pooled)
    for i in range(pooled[0]):
        for j in range(pooled[1]):
            height, width = shape[1] // pooled[0], shape[2] // pooled[1]
            cell = maps[..., i * height : (i + 1) * height, j * width : (j + 1) * width]
            torch.testing.assert_close(features[..., i, j], cell.mean((2, 3)))
