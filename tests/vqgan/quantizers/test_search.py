"""The nearest-neighbour search against explicit distances."""

import torch

from vqgan.quantizers.search import nearest


def test_nearest_is_the_argmin_of_explicit_distances() -> None:
    vectors, codebook = torch.randn(50, 5), torch.randn(9, 5)
    slow = [min(range(9), key=lambda k: float(((v - codebook[k]) ** 2).sum())) for v in vectors]
    assert nearest(vectors, codebook).tolist() == slow
    assert (
        nearest(vectors, codebook, max_scores=28, tile=4, group=2).tolist() == slow
    )  # the same in small tiles


def test_the_first_of_equal_codes_is_nearest() -> None:
    code = torch.randn(1, 5)
    assert nearest(torch.randn(20, 5), code.expand(7, 5)).tolist() == [0] * 20


def test_bf16_distances_would_choose_other_codes() -> None:
    """The reason for searching in float32 under autocast."""
    vectors, codebook = torch.randn(2000, 32), torch.randn(512, 32)
    distances = torch.cdist(vectors.bfloat16().float(), codebook.bfloat16().float()).bfloat16()
    assert (distances.argmin(1) != nearest(vectors, codebook)).float().mean() > 0.02


def test_a_tiled_search_of_a_large_codebook_is_exact() -> None:
    points, codes = torch.randn(300, 8), torch.randn(20_000, 8)
    assert torch.equal(
        nearest(points, codes), torch.cdist(points.double(), codes.double()).argmin(1)
    )
