"""The use of codes, PSNR, SSIM and sharpness, by identities and slow versions."""

import math

import pytest
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from data.images import to_uint8
from evaluation.codebook import CodebookUse
from evaluation.reconstruction import Reconstruction


def test_uniform_codes_have_perplexity_K_and_one_code_has_perplexity_1() -> None:
    use = CodebookUse(8)
    use.update(torch.arange(8).repeat(5))
    use_of_codes = use.compute()
    assert (
        use_of_codes["perplexity"].item(),
        use_of_codes["entropy_bits"].item(),
        use_of_codes["codes_used"].item(),
    ) == pytest.approx((8, 3, 8))
    use.reset()
    use.update(torch.zeros(10, dtype=torch.int64))
    assert use.compute()["perplexity"] == 1
    assert use.compute()["codes_used"] == 1


def test_perplexity_is_that_of_all_batches_together_not_their_average() -> None:
    use = CodebookUse(4)
    for code in range(4):  # each batch alone has perplexity 1
        use.update(torch.full((3, 2, 2), code))
    assert use.compute()["perplexity"] == pytest.approx(4)


def test_perplexity_is_two_to_the_entropy_of_the_counts() -> None:
    use = CodebookUse(3)
    use.update(torch.tensor([0, 0, 0, 1]))
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert use.compute()["entropy_bits"] == pytest.approx(entropy)
    assert use.compute()["perplexity"] == pytest.approx(2**entropy)


def test_psnr_and_ssim_are_means_over_images() -> None:
    x = torch.rand(6, 3, 16, 16) * 2 - 1
    x_hat = x + torch.linspace(0.05, 0.5, 6).view(6, 1, 1, 1) * torch.randn_like(x)
    metric = Reconstruction()
    metric.update(x[:4], x_hat[:4])
    metric.update(x[4:], x_hat[4:])  # batches of unequal size
    a, b = to_uint8(x_hat).float(), to_uint8(x).float()
    psnr = [10 * math.log10(255**2 / float((a[i] - b[i]).square().mean())) for i in range(6)]
    assert metric.compute()["psnr"] == pytest.approx(sum(psnr) / 6, abs=1e-4)
    assert metric.compute()["ssim"] == pytest.approx(
        float(structural_similarity_index_measure(a, b, data_range=255.0)), abs=1e-5
    )
    pooled = float(peak_signal_noise_ratio(a, b, data_range=255.0))
    assert pooled < sum(psnr) / 6 - 0.1  # a different score, not comparable


def test_pixels_out_of_range_are_clamped_first() -> None:
    metric = Reconstruction()
    metric.update(
        torch.ones(1, 3, 16, 16) - torch.eye(16),
        torch.full((1, 3, 16, 16), 7.0) - 7 * torch.eye(16),
    )
    assert metric.compute()["psnr"] == torch.inf


def test_entropies_of_several_codebooks_add_up_and_the_least_used_is_reported() -> None:
    use = CodebookUse(4, num_codebooks=2)
    indices = torch.stack(
        [torch.arange(4).repeat(4), torch.tensor([0, 1]).repeat(8)], 1
    )  # all four alike; two of them
    use.update(indices.view(2, 4, 2, 2)[:1])
    use.update(indices.view(2, 4, 2, 2)[1:])
    scores = {name: float(value) for name, value in use.compute().items()}
    assert scores == pytest.approx(
        {"entropy_bits": 3, "perplexity": 2**1.5, "codes_used": 2, "usage": 0.5}
    )


def sharpness(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    metric = Reconstruction()
    metric.update(x, x_hat)
    return float(metric.compute()["sharpness"])


def test_an_image_is_as_sharp_as_itself_and_a_flat_one_has_no_sharpness() -> None:
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    assert sharpness(x, x) == 1
    assert sharpness(x, torch.full_like(x, 0.3)) == 0


def test_sharpness_is_a_ratio_of_squared_differences_of_neighbouring_8_bit_pixels() -> None:
    x, x_hat = torch.rand(2, 3, 12, 13) * 2 - 1, torch.randn(2, 3, 12, 13)
    sums = []
    for pixels in (to_uint8(x_hat).tolist(), to_uint8(x).tolist()):
        planes = [plane for image in pixels for plane in image]
        right = sum(
            (row[j + 1] - row[j]) ** 2 for plane in planes for row in plane for j in range(12)
        )
        below = sum(
            (plane[i + 1][j] - plane[i][j]) ** 2
            for plane in planes
            for i in range(11)
            for j in range(13)
        )
        sums.append(right + below)
    assert sharpness(x, x_hat) == pytest.approx(sums[0] / sums[1], rel=1e-6)


def test_sharpness_is_that_of_all_batches_together() -> None:
    x, x_hat = torch.rand(6, 1, 16, 16) * 2 - 1, torch.rand(6, 1, 16, 16) - 0.5
    x[:2] *= 0.1  # the first batch alone would have another ratio
    metric = Reconstruction()
    metric.update(x[:2], x_hat[:2])
    metric.update(x[2:], x_hat[2:])
    assert float(metric.compute()["sharpness"]) == pytest.approx(sharpness(x, x_hat), rel=1e-6)
