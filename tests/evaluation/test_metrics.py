"""The use of codes, PSNR, SSIM and sharpness, by identities and slow versions."""

import math

import pytest
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image import PeakSignalNoiseRatio

from codegrid.data.images import to_float, to_uint8
from codegrid.evaluation.codebook import CodebookUse
from codegrid.evaluation.reconstruction import Reconstruction

# 10 log10(255^2 / (1/12)): the PSNR of an image that is reproduced without error, of 8 bits and of 16.
MAX_PSNR = 58.9226
MAX_DEEP_PSNR = 107.1213


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
    metric.update(x[:4], x_hat[:4], depth=8)
    metric.update(x[4:], x_hat[4:], depth=8)  # batches of unequal size
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
        depth=8,
    )
    assert metric.compute()["psnr"] == pytest.approx(MAX_PSNR), "nothing is lost"


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
    metric.update(x, x_hat, depth=8)
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
    metric.update(x[:2], x_hat[:2], depth=8)
    metric.update(x[2:], x_hat[2:], depth=8)
    assert float(metric.compute()["sharpness"]) == pytest.approx(sharpness(x, x_hat), rel=1e-6)


def measure(x: torch.Tensor, x_hat: torch.Tensor, batch: int = 2) -> dict[str, float]:
    """The scores of images and their reconstructions (n, C, H, W), uint8 or of 16 bits in int32."""
    metric = Reconstruction()
    depth = 8 if x.dtype == torch.uint8 else 16
    for images, reconstructions in zip(x.split(batch), x_hat.split(batch), strict=True):
        metric.update(to_float(images), to_float(reconstructions), depth)
    return {name: float(value) for name, value in metric.compute().items()}


def levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def deep_levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 65_536, shape, dtype=torch.int32)


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_blank_images_without_error_leave_the_mean_finite(grey: int) -> None:
    """Blank slices, masks and white pages, two of three images."""
    x, x_hat = levels(6, 1, 16, 16), levels(6, 1, 16, 16)
    x[2:] = x_hat[2:] = grey
    others = measure(x[:2], x_hat[:2])["psnr"]
    assert measure(x, x_hat)["psnr"] == pytest.approx((2 * others + 4 * MAX_PSNR) / 6, abs=1e-4)


def test_the_floor_does_not_depend_on_size_channels_or_batch() -> None:
    for shape in ((1, 1, 12, 16), (3, 3, 32, 24), (5, 4, 16, 16)):
        x = levels(*shape)
        assert measure(x, x, batch=1)["psnr"] == pytest.approx(MAX_PSNR, abs=1e-4)


def test_an_image_with_the_error_of_rounding_or_more_has_its_own_psnr() -> None:
    """One level in every twelfth pixel is a squared error of 1/12; one pixel alone is less."""
    x = levels(1, 1, 12, 12).clamp(max=254)
    off = x.clone()
    off.flatten()[::6] += 1
    assert measure(x, off)["psnr"] == pytest.approx(10 * math.log10(255**2 * 6), abs=1e-4)
    off = x.clone()
    off[0, 0, 3, 5] += 1
    assert measure(x, off)["psnr"] == pytest.approx(MAX_PSNR, abs=1e-4)


def test_the_psnr_of_images_with_errors_is_torchmetrics_to_the_bit() -> None:
    x = levels(7, 3, 16, 16)
    noise = torch.randint(-9, 10, x.shape)
    x_hat = (x + noise).clamp(0, 255).to(torch.uint8)
    theirs = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
    for a, b in zip(x_hat.split(3), x.split(3), strict=True):
        theirs.update(a.float(), b.float())
    assert measure(x, x_hat, batch=3)["psnr"] == float(theirs.compute())


def test_constant_images_have_an_ssim_from_0_to_1() -> None:
    greys = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8)
    x = greys.view(5, 1, 1, 1).expand(5, 1, 16, 16)
    assert measure(x, x)["ssim"] == pytest.approx(1)
    assert 0 <= measure(x, x.flip(0))["ssim"] < 1
    assert 0 <= measure(x[:1], levels(1, 1, 16, 16))["ssim"] < 1


def test_blank_images_have_no_sharpness_and_some_blank_ones_change_nothing() -> None:
    blank = torch.full((2, 3, 16, 16), 200, dtype=torch.uint8)
    assert math.isnan(measure(blank, blank)["sharpness"])
    assert math.isnan(measure(blank, levels(2, 3, 16, 16))["sharpness"])
    x, x_hat = levels(2, 3, 16, 16), levels(2, 3, 16, 16)
    assert measure(torch.cat([x, blank]), torch.cat([x_hat, blank])) == pytest.approx(
        measure(torch.cat([x, blank]), torch.cat([x_hat, blank]), batch=1)
    )
    assert measure(torch.cat([x, blank]), torch.cat([x_hat, blank]))["sharpness"] == pytest.approx(
        measure(x, x_hat)["sharpness"]
    )


def test_a_reconstruction_that_is_nan_has_no_scores_instead_of_those_of_a_black_one() -> None:
    x = to_float(levels(2, 1, 16, 16))
    x_hat = x.clone()
    x_hat[1, 0, 3, 4] = torch.nan
    metric = Reconstruction()
    metric.update(x, x_hat, depth=8)
    assert all(math.isnan(float(value)) for value in metric.compute().values())


def test_the_entropy_of_one_code_is_zero_without_a_sign() -> None:
    use = CodebookUse(4, num_codebooks=2)
    use.update(torch.zeros(5, 2, dtype=torch.int64))
    assert str(float(use.compute()["entropy_bits"])) == "0.0"


def test_psnr_and_ssim_of_16_bits_refer_to_their_whole_range() -> None:
    x = deep_levels(4, 5, 16, 24)
    x_hat = (x + torch.randint(-900, 900, x.shape)).clamp(0, 65_535).int()
    a, b = x_hat.double(), x.double()
    psnr = [10 * math.log10(65_535**2 / float((a[i] - b[i]).square().mean())) for i in range(4)]
    scores = measure(x, x_hat)
    assert scores["psnr"] == pytest.approx(sum(psnr) / 4, abs=1e-4)
    ssim = float(structural_similarity_index_measure(a, b, data_range=65_535.0))
    assert scores["ssim"] == pytest.approx(ssim, abs=1e-6)


def test_differences_below_a_level_of_8_bits_count_in_16_bits() -> None:
    x = deep_levels(2, 1, 16, 16) // 257 * 257  # values that 8 bits can hold
    off = (x + 100).clamp(max=65_535)
    assert torch.equal(to_uint8(to_float(x)), to_uint8(to_float(off))), "8 bits see nothing"
    assert measure(x, off)["psnr"] == pytest.approx(20 * math.log10(65_535 / 100), abs=0.1)
    assert measure(x, off)["ssim"] < 1


def test_16_bits_without_error_have_the_psnr_of_rounding_to_their_own_steps() -> None:
    x = deep_levels(3, 2, 12, 16)
    assert measure(x, x)["psnr"] == pytest.approx(MAX_DEEP_PSNR, abs=1e-4)
    off = x.clone().clamp(max=65_534)
    off.flatten()[::6] += 1
    expected = 10 * math.log10(65_535**2 * 6)
    assert measure(x.clamp(max=65_534), off)["psnr"] == pytest.approx(expected, abs=1e-3)


def test_8_bit_images_have_nearly_the_same_scores_as_16_bit_ones() -> None:
    x, x_hat = levels(4, 3, 16, 16), levels(4, 3, 16, 16)
    deep = measure(x.int() * 257, x_hat.int() * 257)
    assert deep == pytest.approx(measure(x, x_hat), rel=1e-5, abs=1e-6)


def test_bright_even_images_of_16_bits_keep_their_similarity() -> None:
    """float32 would make it 0.9992."""
    x = torch.full((1, 1, 16, 16), 65_000, dtype=torch.int32)
    x_hat = x + torch.randint(-1, 2, x.shape, dtype=torch.int32)
    assert measure(x, x_hat)["ssim"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(5, 64), (64, 4)])
def test_images_that_are_narrower_than_half_a_window_have_no_ssim(size: tuple[int, int]) -> None:
    x, x_hat = levels(3, 3, *size), levels(3, 3, *size)
    scores = measure(x, x_hat)
    assert math.isnan(scores["ssim"])
    assert scores["psnr"] > 5
    assert not math.isnan(measure(levels(2, 3, 6, 64), levels(2, 3, 6, 64))["ssim"])
