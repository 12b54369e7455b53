import cmath
import math

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from vqgan.losses.pixel import Pixel, focal_frequency

FOCAL = make(Pixel, l1=0, l2=0, focal=1)


def test_equal_images_have_no_focal_loss_and_a_finite_gradient() -> None:
    x_hat = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = FOCAL(x_hat.detach(), x_hat)
    loss.backward()
    assert loss == 0
    assert x_hat.grad is not None
    assert torch.equal(x_hat.grad, torch.zeros_like(x_hat))


def test_a_flat_spectrum_is_weighted_like_the_mean_square() -> None:
    difference = torch.zeros(2, 3, 8, 8)
    difference[:, :, 3, 5] = torch.randn(2, 3)  # a single pixel, each channel of its own size
    torch.testing.assert_close(focal_frequency(difference), difference.square().mean())


def test_a_single_frequency_counts_in_full_and_any_other_image_less() -> None:
    wave = torch.cos(2 * math.pi * torch.arange(8) / 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(focal_frequency(wave), wave.square().mean())
    noise = torch.randn(4, 3, 8, 8)
    assert focal_frequency(noise) < 0.9 * noise.square().mean()


def test_it_equals_the_sums_of_the_paper() -> None:
    n = 4
    difference = torch.randn(2, 3, n, n)
    total = 0.0
    for channel in difference.flatten(0, 1).tolist():
        power = []
        for u in range(n):
            for v in range(n):
                terms = [
                    channel[i][j] * cmath.exp(-2j * cmath.pi * (u * i + v * j) / n) / n
                    for i in range(n)
                    for j in range(n)
                ]
                power.append(abs(sum(terms)) ** 2)
        total += sum(p * math.sqrt(p / max(power)) for p in power) / (n * n)
    assert focal_frequency(difference).item() == pytest.approx(total / 6, rel=1e-4)


def test_the_weight_of_a_frequency_has_no_gradient() -> None:
    difference = torch.randn(1, 1, 4, 4, requires_grad=True)
    focal_frequency(difference).backward()
    spectrum = torch.fft.fft2(difference.detach(), norm="ortho")
    weight = spectrum.abs() / spectrum.abs().max()
    expected = torch.fft.ifft2(2 * weight * spectrum, norm="ortho").real / 16
    torch.testing.assert_close(difference.grad, expected)


def test_the_three_losses_add_up() -> None:
    x, x_hat = torch.randn(2, 2, 3, 8, 8)
    parts = 2 * make(Pixel, 1, 0)(x, x_hat) + 3 * make(Pixel, 0, 1)(x, x_hat) + 5 * FOCAL(x, x_hat)
    torch.testing.assert_close(make(Pixel, 2, 3, 5)(x, x_hat), parts)


def test_every_image_and_channel_has_its_own_largest_frequency() -> None:
    one, other = torch.randn(2, 1, 3, 8, 8)
    together = focal_frequency(torch.cat([one, 10 * other]))
    torch.testing.assert_close(together, (focal_frequency(one) + focal_frequency(10 * other)) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_focal_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, x_hat = torch.randn(2, 1, 1, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = FOCAL(x, x_hat)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, FOCAL(x.float(), x_hat.float()))


@pytest.mark.parametrize("name", ["l1", "l2", "focal"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"loss.pixel.{name}=-1 must be a number at least 0"):
        make(Pixel, **{name: -1})


def test_three_weights_of_zero_are_refused() -> None:
    with pytest.raises(InputError, match="loss.pixel has l1=0, l2=0 and focal=0, which is no loss"):
        make(Pixel, 0, 0, 0)
