"""Classical VQ and JPEG, the codecs that tokenizers are compared with."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.shapes import Shapes
from codegrid.evaluation.reconstruction import Reconstruction
from tests.helpers.images import make_images
from tests.helpers.stage1 import make_tokenizer
from vqgan.baselines import count_scan_bits, measure_classical_vq, measure_codecs, measure_jpeg
from vqgan.load import start_images


def make_shapes(tmp_path: Path, **settings: object) -> Shapes:
    return make_images(
        Shapes, image_size=16, n_train=200, n_val=50, cache_dir=str(tmp_path), **settings
    )


def test_the_classical_baseline_equals_a_tokenizer_initialised_from_patches(tmp_path: Path) -> None:
    data = make_shapes(tmp_path)
    figures = measure_classical_vq(data, K=16, grid=(4, 4))
    tokenizer, metric = make_tokenizer(dim=48), Reconstruction()
    tokenizer.initialise(start_images(data))
    with torch.no_grad():
        for images, _ in data.iterate_split("val"):
            x, _ = data.on_after_batch_transfer((images, torch.zeros(1)), 0)
            metric.update(x, tokenizer.decode(tokenizer.encode(x).z_q), depth=8)
    assert figures["psnr"] == pytest.approx(float(metric.compute()["psnr"]), abs=0.5)
    assert figures["codes_used"] <= 16


def test_images_larger_than_the_models_are_cropped(tmp_path: Path) -> None:
    assert (
        5
        < measure_classical_vq(make_shapes(tmp_path, crop="random"), K=16, grid=(4, 4))["psnr"]
        < 40
    )


def test_scan_bits_of_a_jpeg_include_stuffed_bytes_but_no_headers() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
        file, "JPEG", quality=90
    )
    content = file.getvalue()
    start = content.index(b"\xff\xda")
    header = int.from_bytes(content[start + 2 : start + 4]) + 2
    assert content.endswith(b"\xff\xd9")
    assert count_scan_bits(content) == 8 * (len(content) - 2 - start - header)


def test_flat_images_take_few_bits_and_higher_quality_takes_more() -> None:
    flat = measure_jpeg(torch.full((2, 3, 16, 16), 128, dtype=torch.uint8), [50])[0]
    assert flat["bits_per_image"] <= 24
    low, high = measure_jpeg(torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), [5, 90])
    assert low["bits_per_image"] < high["bits_per_image"]
    assert low["psnr"] < high["psnr"]
    assert (low["codec"], low["settings"]["quality"], low["settings"]["n"]) == ("JPEG", 5, 3)


def test_grey_images_are_coded_without_colour() -> None:
    grey = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    assert measure_jpeg(grey, [95])[0]["psnr"] > 30
    assert (
        measure_jpeg(grey, [95])[0]["bits_per_image"]
        < measure_jpeg(grey.expand(-1, 3, -1, -1), [95])[0]["bits_per_image"]
    )


def test_codecs_have_the_tokenizers_bits_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_shapes(tmp_path)
    rows, absent = measure_codecs(data, "val", K=4, num_codebooks=2, grid=(4, 4))
    assert not absent
    assert rows[0]["codec"] == "classical VQ"
    assert rows[0]["bits_per_image"] == 4 * 4 * 2 * 2  # two codebooks of 4 codes count as one of 16
    monkeypatch.setattr("vqgan.baselines.measure_classical_vq", None)
    monkeypatch.setattr("vqgan.baselines.measure_jpeg", None)
    assert (
        measure_codecs(make_shapes(tmp_path), "val", K=4, num_codebooks=2, grid=(4, 4))[0] == rows
    )


@pytest.mark.parametrize(("K", "reason"), [(None, "continuous"), (2**18, "262,144 codes")])
def test_a_missing_classical_codec_comes_with_the_reason(
    tmp_path: Path, K: int | None, reason: str
) -> None:
    rows, absent = measure_codecs(make_shapes(tmp_path), "val", K, num_codebooks=1, grid=(4, 4))
    assert reason in absent["classical VQ"]
    assert {row["codec"] for row in rows} == {"JPEG"}
