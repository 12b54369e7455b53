"""The recipes of conf/experiment: each has its size, and trains for two steps, with its discriminator where it has one."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import start
from tests.helpers.configs import compose_config
from vqgan.load import build_tokenizer

pytestmark = pytest.mark.slow
RECIPES = {  # name -> pixels a side, codes a side, K, and the tokenizer's millions of parameters
    "imagenet256_f16": (256, 16, 16384, 72),
    "faces256_f16": (256, 16, 1024, 72),
    "small_data_256": (256, 16, 1024, 4),
    "cifar10_f4": (32, 8, 512, 5),
    "celeba64_f4": (64, 16, 512, 5),
    "celeba64_published": (64, 16, 512, 5),
    "imagenet64_published": (64, 16, 16384, 5),
}
GAN = ["loss.gate.start=0", "loss.gate.ramp=0", "loss.gate.warmup=0"]  # open from the first step


# Its networks are those of imagenet256_f16, which trains at its full size.
NARROW = {"faces256_f16": "model.width=32"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_has_its_size(recipe: str, tmp_path: Path) -> None:
    """Painted shapes stand for its images, and random weights for LPIPS's: neither can be downloaded here."""
    size, grid, K, millions = RECIPES[recipe]
    words = [*(GAN if recipe.endswith("256_f16") or recipe == "small_data_256" else [])]
    if recipe.endswith("256_f16"):
        words.append("loss.perceptual.pretrained=false")
    images = ["data=shapes", f"data.image_size={size}", "data.n_train=8", "data.n_val=1"]
    line = ["stage=vqgan", f"experiment={recipe}", *images]
    run = start(
        *line, "data.batch_size=2", "data.cache=ram", "logger=csv", "run_dir=run",
        "trainer.accelerator=cpu", "trainer.accumulate=1", "trainer.max_steps=2", "trainer.log_every=1", *words,
        *([NARROW[recipe]] if recipe in NARROW else []), folder=tmp_path,
    )  # fmt: skip
    config = compose_config(*line)
    with torch.device("meta"):
        tokenizer = build_tokenizer(config.model, config.quantizer)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    assert round(parameters / 1e6) == millions
    assert run.wait(1800) == 0, run.log[-3000:]
    report = json.loads(run.output.read_text().splitlines()[-1])
    assert report["K"] == K
    assert report["grid"] == [grid, grid]
    assert recipe in NARROW or report["parameters"] == parameters
    assert report["steps"] == 2
    [file] = (tmp_path / "run/csv").rglob("metrics.csv")
    with file.open(newline="") as lines:
        updates = [row for row in csv.DictReader(lines) if row["train/rec"]]
    assert len(updates) == 2
    if words:
        assert all(float(row["train/lambda"]) >= 0 for row in updates)
        assert float(updates[1]["train/discriminator"]) > 0
