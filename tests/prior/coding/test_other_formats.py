"""Bytes of JPEG, WebP and AVIF files at the quality of codes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.engine.errors import InputError
from prior.coding.other_formats import (
    LOSSY_FORMATS,
    check_formats,
    measure_format,
    try_quality,
)


def make_images(channels: int = 3, n: int = 2, size: int = 32) -> torch.Tensor:
    """Smooth pictures (n, channels, size, size) uint8."""
    waves = torch.linspace(0, 6, size)
    pictures = [
        torch.stack(
            [(waves + i + c).sin()[:, None] * (waves * (c + 1)).cos() for c in range(channels)]
        )
        for i in range(n)
    ]
    return ((torch.stack(pictures) + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize("name", LOSSY_FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_lowest_quality_that_is_good_enough_is_measured(name: str, channels: int) -> None:
    images = make_images(channels)
    row = measure_format(name, images, psnr=28.0)
    assert not isinstance(row, str)
    assert row["psnr"] >= 28.0
    assert 0 < row["payload_bytes"] < row["bytes"]
    if row["quality"] > 1:
        assert try_quality(LOSSY_FORMATS[name], images, row["quality"] - 1)["psnr"] < 28.0


@pytest.mark.parametrize("name", LOSSY_FORMATS)
def test_what_is_no_header_changes_with_the_picture_and_headers_do_not(name: str) -> None:
    chosen = LOSSY_FORMATS[name]
    files = [
        chosen.save(image.movedim(0, -1).numpy(), 60)
        for image in (make_images(n=1)[0], torch.full((3, 32, 32), 90, dtype=torch.uint8))
    ]
    headers = [len(file) - chosen.count(file) for file in files]
    assert chosen.count(files[0]) > chosen.count(files[1])
    if name != "jpeg":  # whose tables are optimised for each picture
        assert abs(headers[0] - headers[1]) <= 1, "chunks of odd length are padded"


@pytest.mark.parametrize("name", LOSSY_FORMATS)
def test_psnr_is_that_of_the_files(name: str) -> None:
    images = make_images(n=1)
    file = LOSSY_FORMATS[name].save(images[0].movedim(0, -1).numpy(), 40)
    with Image.open(io.BytesIO(file)) as opened:
        read = np.asarray(opened).astype(float)
    error = np.square(read - images[0].movedim(0, -1).numpy()).mean()
    row = try_quality(LOSSY_FORMATS[name], images, 40)
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-2)
    assert row["bytes"] == len(file)


def test_a_format_that_is_never_good_enough_is_absent_with_its_reason() -> None:
    noise = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    reason = measure_format("jpeg", noise, psnr=60.0)
    assert isinstance(reason, str)
    assert "its highest quality has" in reason


def test_formats_are_checked() -> None:
    assert check_formats(None) == []
    assert check_formats("avif") == ["avif"]
    with pytest.raises(
        InputError, match="compare=gif must be one of jpeg, webp, avif, several, or null"
    ):
        check_formats(["jpeg", "gif"])
