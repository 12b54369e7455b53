from pathlib import Path

import pytest
import torch

from benchmarks.bottlenecks import LAYOUTS
from benchmarks.classical import classical
from benchmarks.quantizers import COLUMNS, alone
from data.shapes import Shapes
from tests.vqgan.test_tokenizer import tokenizer
from vqgan.metrics.reconstruction import Reconstruction
from vqgan.stages import start_images


def test_the_classical_baseline_is_where_a_tokenizer_of_patches_starts(tmp_path: Path) -> None:
    data = Shapes(image_size=16, n_train=200, n_val=50, cache_dir=str(tmp_path))
    found = classical(data, K=16, grid=4)
    started, metric = tokenizer(dim=48), Reconstruction()
    started.start(start_images(data))
    with torch.no_grad():
        for images, _ in data.once("val"):
            x, _ = data.on_after_batch_transfer((images, torch.zeros(1)), 0)
            metric.update(x, started.decode(started.encode(x).z_q))
    assert found["psnr"] == pytest.approx(float(metric.compute()["psnr"]), abs=0.5)
    assert found["codes_used"] <= 16


def test_the_bottlenecks_that_are_compared_are_all_there_are() -> None:
    assert set(LAYOUTS) == {p.stem for p in (Path(__file__).parents[1] / "conf" / "quantizer").glob("*.yaml")}


def test_a_row_of_the_quantizers_benchmark_has_all_columns() -> None:
    row = alone((1, 2, 32, 4), "cpu")
    assert tuple(row) == COLUMNS
    assert row["ours_ms"] > 0
    assert row["extra_mib"] >= 0
