"""Each bottleneck trains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.configs import ROOT, list_options


@pytest.mark.slow
@pytest.mark.parametrize("name", list_options("quantizer"))
def test_300_steps_on_shapes_end_without_collapse(
    name: str, command: Callable[..., int], tmp_path: Path
) -> None:
    settings = OmegaConf.load(ROOT / "conf" / "quantizer" / f"{name}.yaml")
    size = {"K": 64, "num_codebooks": 2}
    words = [f"quantizer.{key}={value}" for key, value in size.items() if key in settings]
    code = command(
        "stage=vqgan", "loss=vqvae", f"quantizer={name}", *words, "data.n_train=2000", "data.n_val=500",
        "data.image_size=32", "model.grid=4", "model.width=16", "trainer.accelerator=cpu", "trainer.max_steps=300",
        "trainer.val_every=300", "trainer.save_every=300", "logger=csv", "run_dir=run",
    )  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["psnr"] > 13  # the mean image has 9
    if "K" in settings:
        assert metrics["usage"] > 0.9
