"""Each bottleneck trains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.configs import ROOT, list_options


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the images of all bottlenecks, which are drawn once."""
    return tmp_path_factory.mktemp("images")


@pytest.mark.slow
@pytest.mark.parametrize("name", list_options("quantizer"))
def test_150_steps_on_shapes_end_without_collapse(
    name: str, command: Callable[..., int], tmp_path: Path, images: Path
) -> None:
    settings = OmegaConf.load(ROOT / "conf" / "quantizer" / f"{name}.yaml")
    size = {"K": 64, "num_codebooks": 2}
    words = [f"quantizer.{key}={value}" for key, value in size.items() if key in settings]
    code = command(
        "stage=vqgan", "loss=vqvae", f"quantizer={name}", *words, "data.n_train=500", "data.n_val=200",
        "data.image_size=16", "model.grid=4", "model.width=16", "model.decoder.depth=1", "trainer.accelerator=cpu",
        "trainer.max_steps=150", "trainer.val_every=150", "trainer.save_every=150", "logger=csv", f"cache_dir={images}",
        "run_dir=run",
    )  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["psnr"] > 14  # the mean image has 12
    if "K" in settings:
        assert metrics["usage"] > 0.9
