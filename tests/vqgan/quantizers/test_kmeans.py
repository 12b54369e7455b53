import torch

from vqgan.quantizers.kmeans import kmeans
from vqgan.quantizers.search import nearest


def test_kmeans_finds_the_clusters() -> None:
    centres = 10 * torch.randn(5, 3)
    points = centres.repeat(40, 1) + 0.01 * torch.randn(200, 3)
    fitted, counts = kmeans(points, 5)
    assert counts.tolist() == [40] * 5
    assert torch.cdist(centres, fitted).min(1).values.max() < 0.05


def test_kmeans_has_few_empty_clusters_even_if_most_points_are_identical() -> None:
    points = torch.cat([torch.zeros(1000, 4), torch.randn(200, 4)])
    _, counts = kmeans(points, 64)
    assert (counts > 0).sum() >= 60


def test_more_iterations_lower_the_error_of_kmeans() -> None:
    points = torch.randn(500, 4)
    errors = [
        (points - c[nearest(points, c)]).square().sum()
        for c, _ in (kmeans(points, 16, n) for n in (0, 1, 10))
    ]
    assert errors[0] > errors[1] > errors[2]


def test_kmeans_with_fewer_points_than_codes_still_fills_the_codebook() -> None:
    centres, counts = kmeans(torch.randn(3, 4), 8)
    assert centres.shape == (8, 4)
    assert centres.isfinite().all()
    assert counts.sum() == 3
