"""A folder that grows or shrinks between the stages keeps every image on its side, and every stage says what has changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings

pytestmark = lightning_warnings

TINY_FOLDER = [word for word in TINY if "n_train" not in word and "n_val" not in word]
SAMPLE = ["stage=sample", "ckpt=runs/prior/photos", "accelerator=cpu", "n=2", "save=[neighbours]"]
PLAIN = [*QUICK, "inception=false", "references=false", "lpips=null", "proxy=0"]


def grow(root: Path, n: int = 20) -> None:
    """Add n pictures in front of the others, with other names than any of theirs."""
    random = np.random.default_rng(n)
    for i in range(n):
        pixels = random.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / "cats" / f"-{n}-{i}.png")


def read_data(folder: str) -> Any:
    """What the last start of a run recorded about its images."""
    return json.loads(Path(folder, "record.jsonl").read_text().splitlines()[-1])["data"]


def read_split_at(folder: str) -> Any:
    return OmegaConf.load(Path(folder, "config.yaml")).data.split_at


@pytest.mark.slow
def test_every_stage_keeps_the_split_of_a_grown_folder(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stage=vqgan", "data=folder", f"data.root={photos}", "data.n_val=4", *TINY_FOLDER]
    assert command(*line) == 0
    at = read_split_at("runs/vqgan/photos")
    assert 0 < at < 1
    assert (read_data("runs/vqgan/photos")["train"], read_data("runs/vqgan/photos")["val"]) == (
        12,
        4,
    )
    grow(photos)
    (photos / "dogs" / "3.png").unlink()

    line = ["stage=vqgan", "resume=runs/vqgan/photos", "trainer.max_steps=8"]
    assert command(*line) == 0
    assert command("stage=prior", "ckpt=runs/vqgan/photos", *TINY_PRIOR) == 0
    resumed, prior = read_data("runs/vqgan/photos"), read_data("runs/prior/photos")
    assert (resumed["train"], resumed["val"]) == (prior["train"], prior["val"])
    assert resumed["train"] + resumed["val"] == 35
    assert resumed["decided"] == prior["decided"] == {"split_at": at}
    assert read_split_at("runs/vqgan/photos") == at
    assert command(*SAMPLE) == 0
    for of in ("vqgan", "prior"):
        assert command("stage=evaluate", f"ckpt=runs/{of}/photos", *PLAIN, f"run_dir={of}") == 0
        assert json.loads(Path(of, "metrics.json").read_text())["n"] == resumed["val"]


@pytest.mark.slow
def test_two_seeds_of_a_sweep_validate_on_the_same_images_and_it_goes_on_after_growth(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["-m", "stage=vqgan", "data=folder", f"data.root={photos}", "data.n_val=4", "sweep=s"]
    line += [*TINY_FOLDER, "trainer.max_steps=2"]
    assert command(*line, "seed=0,1") == 0
    folders = sorted(Path("runs/sweeps/s").glob("*_seed-*"))
    first, second = (read_data(str(folder)) for folder in folders)
    assert first == second
    capsys.readouterr()
    assert command(*line, "seed=0,1") == 0
    assert capsys.readouterr().err.count("finished before") == 2
    shutil.rmtree(folders[1])
    grow(photos)
    assert command(*line, "seed=0,1") == 0
    assert capsys.readouterr().err.count("finished before") == 1
