""""""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.shapes import Shapes
from evaluation.reconstruction import Reconstruction
from tests.helpers.images import make_images
from tests.helpers.stage1 import make_tokenizer
from vqgan.baselines import count_scan_bits, measure_classical_vq, measure_codecs, measure_jpeg
from vqgan.load import start_images


def shapes(tmp_path: Path, **settings: object) -> Shapes:
    return make_images(
        Shapes, image_size=16, n_train=200, n_val=50, cache_dir=str(tmp_path), **settings
    )


def test_the_classical_baseline_is_where_a_tokenizer_of_patches_starts(tmp_path: Path) -> None:
    data = shapes(tmp_path)
    found = measure_classical_vq(data, K=16, grid=4)
    started, metric = make_tokenizer(dim=48), Reconstruction()
    started.initialise(start_images(data))
    with torch.no_grad():
        for images, _ in data.iterate_split("val"):
            x, _ = data.on_after_batch_transfer((images, torch.zeros(1)), 0)
            metric.update(x, started.decode(started.encode(x).z_q))
    assert found["psnr"] == pytest.approx(float(metric.compute()["psnr"]), abs=0.5)
    assert found["codes_used"] <= 16


def test_images_that_are_larger_than_the_model_sees_are_cut(tmp_path: Path) -> None:
    assert 5 < measure_classical_vq(shapes(tmp_path, crop="random"), K=16, grid=4)["psnr"] < 40


def test_of_a_jpeg_file_the_scan_is_counted_without_headers_and_stuffed_bytes_belong_to_it() -> (
    None
):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
        file, "JPEG", quality=90
    )
    content = file.getvalue()
    start = content.index(b"\xff\xda")
    header = int.from_bytes(content[start + 2 : start + 4]) + 2
    assert content.endswith(b"\xff\xd9")
    assert count_scan_bits(content) == 8 * (len(content) - 2 - start - header)


def test_a_flat_image_takes_hardly_any_bits_and_quality_costs_bits() -> None:
    flat = measure_jpeg(torch.full((2, 3, 16, 16), 128, dtype=torch.uint8), [50])[0]
    assert flat["bits_per_image"] <= 24
    low, high = measure_jpeg(torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), [5, 90])
    assert low["bits_per_image"] < high["bits_per_image"]
    assert low["psnr"] < high["psnr"]
    assert (low["codec"], low["settings"]["quality"], low["settings"]["n"]) == ("JPEG", 5, 3)


def test_grey_images_are_coded_as_such() -> None:
    grey = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    assert measure_jpeg(grey, [95])[0]["psnr"] > 30
    assert (
        measure_jpeg(grey, [95])[0]["bits_per_image"]
        < measure_jpeg(grey.expand(-1, 3, -1, -1), [95])[0]["bits_per_image"]
    )


def test_references_have_the_tokenizers_bits_and_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shapes(tmp_path)
    found, absent = measure_codecs(data, "val", K=4, num_codebooks=2, grid=4)
    assert not absent
    assert found[0]["codec"] == "classical VQ"
    assert found[0]["bits_per_image"] == 4 * 4 * 2 * 2  # two codebooks of 4 codes: as one of 16
    monkeypatch.setattr("vqgan.baselines.measure_classical_vq", None)
    monkeypatch.setattr("vqgan.baselines.measure_jpeg", None)
    assert measure_codecs(shapes(tmp_path), "val", K=4, num_codebooks=2, grid=4)[0] == found


@pytest.mark.parametrize(("K", "says"), [(None, "continuous"), (2**18, "262,144 codes")])
def test_where_there_is_no_classical_codec_to_compare_with_the_reason_is_told(
    tmp_path: Path, K: int | None, says: str
) -> None:
    found, absent = measure_codecs(shapes(tmp_path), "val", K, num_codebooks=1, grid=4)
    assert says in absent["classical VQ"]
    assert {row["codec"] for row in found} == {"JPEG"}
