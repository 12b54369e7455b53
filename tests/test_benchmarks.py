from pathlib import Path

import pytest
import torch

from benchmarks.classical import classical
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
