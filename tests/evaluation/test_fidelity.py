"""Scores of reconstructions against scikit-image, torchmetrics and slow versions."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    StructuralSimilarityIndexMeasure,
)

from codegrid.data.images import to_uint8
from codegrid.evaluation.reconstruction import SCALE_WEIGHTS, Fidelity, count_scales


def images(size: int, n: int = 3) -> tuple[Tensor, Tensor]:
    x = (
        torch.nn.functional.interpolate(
            torch.rand(n, 3, size // 4, size // 4), size=size, mode="bilinear"
        )
        * 2
        - 1
    )
    return x, x + 0.1 * torch.randn_like(x)


def measure(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    metric = Fidelity(x.shape[-1])
    metric.update(x[:1], x_hat[:1], depth=8)
    metric.update(x[1:], x_hat[1:], depth=8)
    return {name: float(value) for name, value in metric.compute().items()}


def test_psnr_equals_scikit_images() -> None:
    x, x_hat = images(32)
    a, b = (to_uint8(each).permute(0, 2, 3, 1).numpy() for each in (x, x_hat))
    psnr = np.mean(
        [peak_signal_noise_ratio(*pair, data_range=255) for pair in zip(a, b, strict=True)]
    )
    assert measure(x, x_hat)["psnr"] == pytest.approx(psnr, abs=1e-4)


def test_ssim_equals_scikit_images_at_every_pixel_whose_window_lies_within_the_image() -> None:
    """The means differ: torchmetrics counts the border, where windows see the mirrored image, and scikit-image does not."""
    x, x_hat = images(32)
    a, b = (to_uint8(each).permute(0, 2, 3, 1).numpy() for each in (x, x_hat))
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
        "channel_axis": 2,
    }
    theirs = np.mean([structural_similarity(*pair, **settings) for pair in zip(a, b, strict=True)])
    metric = StructuralSimilarityIndexMeasure(data_range=255.0, return_full_image=True)
    mean, maps = metric(to_uint8(x_hat).float(), to_uint8(x).float())
    assert float(maps[:, :, 5:-5, 5:-5].mean()) == pytest.approx(theirs, abs=1e-4)
    assert measure(x, x_hat)["ssim"] == pytest.approx(float(mean), abs=1e-5)


def test_l1_and_l2_are_of_8_bit_pixels_from_0_to_1() -> None:
    x, x_hat = images(16)
    apart = (to_uint8(x).double() - to_uint8(x_hat).double()) / 255
    assert measure(x, x_hat)["l1"] == pytest.approx(float(apart.abs().mean()), rel=1e-6)
    assert measure(x, x_hat)["l2"] == pytest.approx(float(apart.square().mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("size", "n"),
    [(8, 0), (11, 1), (16, 1), (24, 2), (64, 3), (96, 3), (128, 4), (175, 4), (176, 5), (256, 5)],
)
def test_there_are_as_many_scales_as_an_image_has_room_for(size: int, n: int) -> None:
    assert count_scales(size) == n
    if 0 < size <= 176:
        x, x_hat = images(size, 2)
        assert ("ms_ssim" in measure(x, x_hat)) == (n > 0)
        assert 0 < measure(x, x_hat).get("ms_ssim", 0.5) < 1


def test_ms_ssim_is_torchmetrics_for_large_images_and_its_first_scales_for_smaller_ones() -> None:
    x, x_hat = images(176, 2)
    theirs = float(
        ms_ssim(to_uint8(x_hat).float(), to_uint8(x).float(), data_range=255.0, normalize="relu")
    )
    whole = (
        SCALE_WEIGHTS[0] + SCALE_WEIGHTS[1] + SCALE_WEIGHTS[2] + SCALE_WEIGHTS[3] + SCALE_WEIGHTS[4]
    )
    assert measure(x, x_hat)["ms_ssim"] == pytest.approx(theirs ** (1 / whole), rel=1e-3)
    x, x_hat = images(24, 1)
    theirs = float(
        ms_ssim(
            to_uint8(x_hat).float(),
            to_uint8(x).float(),
            data_range=255.0,
            betas=SCALE_WEIGHTS[:2],
            normalize="relu",
        )
    )
    metric = Fidelity(24)
    metric.update(x, x_hat, depth=8)
    assert float(metric.compute()["ms_ssim"]) == pytest.approx(
        theirs ** (1 / sum(SCALE_WEIGHTS[:2])), rel=1e-4
    )


@pytest.mark.parametrize("grey", [0, 128, 253, 255])
def test_an_image_without_error_has_a_similarity_of_exactly_1(grey: int) -> None:
    x, x_hat = images(48)
    x[:2] = x_hat[:2] = grey / 127.5 - 1
    scores = measure(x, x_hat)
    others = measure(x[2:].repeat(2, 1, 1, 1), x_hat[2:].repeat(2, 1, 1, 1))
    for name in ("ssim", "ms_ssim"):
        assert scores[name] == pytest.approx((2 + others[name]) / 3, abs=1e-6)
    assert measure(x[:2], x_hat[:2])["ms_ssim"] == 1
    assert measure(x[:2], x_hat[:2])["l2"] == 0


def test_similarities_of_images_with_errors_are_torchmetrics_to_the_bit() -> None:
    x, x_hat = images(48, 5)
    theirs = StructuralSimilarityIndexMeasure(data_range=255.0)
    for part in (slice(0, 1), slice(1, 5)):
        theirs.update(to_uint8(x_hat[part]).float(), to_uint8(x[part]).float())
    assert measure(x, x_hat)["ssim"] == float(theirs.compute())


@pytest.mark.parametrize("shape", [(5, 1, 24, 40), (3, 5, 64, 48), (2, 3, 176, 180)])
def test_all_scales_are_torchmetrics_whatever_the_channels_and_the_memory_format(
    shape: tuple[int, ...],
) -> None:
    x = torch.rand(shape)
    x = x.contiguous(memory_format=torch.channels_last) * 2 - 1
    x_hat = x + 0.2 * torch.randn_like(x)
    metric = Fidelity(shape[2:])
    metric.update(x, x_hat, depth=8)
    weights = torch.tensor(SCALE_WEIGHTS[: metric.scales])
    theirs = MultiScaleStructuralSimilarityIndexMeasure(
        data_range=255.0, betas=tuple((weights / weights.sum()).tolist()), normalize="relu"
    )
    theirs.update(to_uint8(x_hat).float(), to_uint8(x).float())
    assert float(metric.compute()["ms_ssim"]) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_how_many_images_are_compared_together_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, x_hat = images(48, 7)
    together = measure(x, x_hat)
    monkeypatch.setattr("codegrid.evaluation.reconstruction.WINDOWS_AT_ONCE", 1)
    assert measure(x, x_hat) == together


def test_the_scores_are_of_float32_in_a_validation_in_bf16_too() -> None:
    """In bf16 variances are lost, differences of numbers up to 65,025."""
    x, x_hat = images(48)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = measure(x, x_hat)
    assert in_bf16 == measure(x, x_hat)


def test_a_perfect_first_batch_does_not_spoil_later_ones() -> None:
    x, x_hat = images(16)
    x_hat[:1] = x[:1]
    apart = (to_uint8(x).double() - to_uint8(x_hat).double()) / 255
    assert measure(x, x_hat)["l1"] == pytest.approx(float(apart.abs().mean()), rel=1e-6)
    assert measure(x, x_hat)["l2"] == pytest.approx(float(apart.square().mean()), rel=1e-6)


@pytest.mark.parametrize("size", [(24, 40), (64, 12), (176, 200)])
def test_rectangles_have_as_many_scales_as_their_shorter_side(size: tuple[int, int]) -> None:
    x = torch.rand(2, 5, *size) * 2 - 1
    metric = Fidelity(size)
    assert metric.scales == count_scales(min(size))
    metric.update(x, x + 0.1 * torch.randn_like(x), depth=8)
    assert 0 < float(metric.compute()["ms_ssim"]) < 1


def test_scores_of_16_bits_are_of_pixels_from_0_to_1() -> None:
    x, x_hat = images(48)
    metric = Fidelity(48)
    metric.update(x, x_hat, depth=16)
    scores = {name: float(value) for name, value in metric.compute().items()}
    a, b = (((each.double().clamp(-1, 1) + 1) / 2) for each in (x, x_hat))
    assert scores["l1"] == pytest.approx(float((a - b).abs().mean()), abs=1e-6)
    assert scores["l2"] == pytest.approx(float((a - b).square().mean()), abs=1e-7)
    assert scores["ms_ssim"] == pytest.approx(measure(x, x_hat)["ms_ssim"], abs=1e-3)
