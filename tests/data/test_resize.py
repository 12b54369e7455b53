"""Cutting, padding and stretching images of any number of channels and bits."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from codegrid.data.form import FIT_CHOICES
from codegrid.data.resize import fit_image, fit_pixels

SIZES = [(16, 16), (24, 40), (7, 50), (90, 31)]


def blobs(height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Soft blobs, each channel by itself."""
    small = np.random.default_rng(channels).integers(0, 256, (5, 5, channels), np.uint8)
    layers = [Image.fromarray(small[..., i]).resize((width, height)) for i in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], 2)


@pytest.mark.parametrize("fit", FIT_CHOICES)
@pytest.mark.parametrize("size", SIZES)
def test_every_fit_gives_the_size(size: tuple[int, int], fit: str) -> None:
    for pixels in (blobs(48, 80, 5), blobs(48, 80, 2).astype(np.uint16) * 257):
        fitted = fit_pixels(pixels, size, fit)
        assert fitted.shape == (*size, pixels.shape[2])
        assert fitted.dtype == pixels.dtype


@pytest.mark.parametrize("fit", FIT_CHOICES)
def test_an_image_of_the_right_size_is_not_changed(fit: str) -> None:
    pixels = blobs(20, 30, 4)
    assert fit_pixels(pixels, (20, 30), fit) is pixels
    image = Image.fromarray(pixels[..., :3])
    assert fit_image(image, (20, 30), fit) is image


@pytest.mark.parametrize("fit", FIT_CHOICES)
@pytest.mark.parametrize("size", SIZES)
def test_channels_of_eight_bits_are_resized_as_those_of_an_rgb_image(
    size: tuple[int, int], fit: str
) -> None:
    pixels = blobs(48, 80, 3)
    whole = np.asarray(fit_image(Image.fromarray(pixels), size, fit))
    assert np.array_equal(fit_pixels(pixels, size, fit), whole)


@pytest.mark.parametrize("fit", FIT_CHOICES)
@pytest.mark.parametrize("size", SIZES)
def test_sixteen_bits_get_the_antialiasing_of_eight(size: tuple[int, int], fit: str) -> None:
    pixels = blobs(48, 80, 2)
    deep = fit_pixels(pixels.astype(np.uint16) * 257, size, fit) / 257
    assert np.abs(deep - fit_pixels(pixels, size, fit)).max() < 2


def test_a_crop_is_what_pillow_cuts_out() -> None:
    pixels = blobs(48, 80, 3)
    expected = ImageOps.fit(Image.fromarray(pixels), (20, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(fit_pixels(pixels, (16, 20), "crop"), np.asarray(expected))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_padding_shows_the_whole_image_between_borders_of_the_lowest_value(kind: Any) -> None:
    pixels = np.full((10, 20, 5), 200, kind)
    padded = fit_pixels(pixels, (16, 16), "pad")
    assert set(padded[4:12].flat) == {200}  # 8 rows of 16, in the middle
    assert set(padded[:4].flat) | set(padded[12:].flat) == {0}


def test_stretching_shows_the_whole_image_without_borders() -> None:
    pixels = np.zeros((10, 20, 5), np.uint16)
    pixels[:, 10:] = 40_000
    stretched = fit_pixels(pixels, (20, 20), "stretch")
    assert set(stretched[:, :5].flat) == {0}
    assert set(stretched[:, 15:].flat) == {40_000}


def test_overshoot_at_an_edge_stays_within_sixteen_bits() -> None:
    pixels = np.zeros((8, 8, 1), np.uint16)
    pixels[:, 4:] = 65_535
    fitted = fit_pixels(pixels, (64, 64), "stretch")
    assert (fitted[:, :20] < 3000).all()
    assert (fitted[:, 44:] > 62_000).all()
