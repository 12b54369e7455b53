"""A folder that grows or shrinks between the stages keeps every image on its side, and every stage says what has changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings

pytestmark = lightning_warnings

TINY_FOLDER = [
    "loss=vqvae",
    *(word for word in TINY if "n_train" not in word and "n_val" not in word),
]
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


def expect_change(capsys: pytest.CaptureFixture[str], detail: str = "added, as cats") -> None:
    """One sentence says that the images have changed, and that no validation image was trained on."""
    printed = capsys.readouterr().err
    assert printed.count("the images are not those that") == 1, printed
    assert detail in printed
    assert "before" not in printed


@pytest.mark.slow
def test_every_stage_keeps_the_split_of_a_grown_folder(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stage=vqgan", "data=folder", f"data.root={photos}", "data.n_val=4", *TINY_FOLDER]
    assert command(*line) == 0
    at = read_split_at("runs/vqgan/photos")
    capsys.readouterr()
    assert 0 < at < 1
    assert (read_data("runs/vqgan/photos")["train"], read_data("runs/vqgan/photos")["val"]) == (
        12,
        4,
    )
    grow(photos, 5)
    (photos / "dogs" / "3.png").unlink()
    assert command("stage=vqgan", "resume=runs/vqgan/photos", "trainer.max_steps=8") == 0
    expect_change(capsys, "1 missing")
    resumed = read_data("runs/vqgan/photos")
    assert resumed["train"] + resumed["val"] == 20
    assert resumed["decided"] == {"split_at": at}
    assert read_split_at("runs/vqgan/photos") == at

    grow(photos, 6)
    assert command("stage=prior", "ckpt=runs/vqgan/photos", *TINY_PRIOR) == 0
    expect_change(capsys)
    prior = read_data("runs/prior/photos")
    assert prior["train"] + prior["val"] == 26
    assert prior["decided"] == {"split_at": at}

    grow(photos, 7)
    assert command(*SAMPLE) == 0
    expect_change(capsys)
    for of in ("vqgan", "prior"):
        assert command("stage=evaluate", f"ckpt=runs/{of}/photos", *PLAIN, f"run_dir={of}") == 0
        expect_change(capsys)
        assert json.loads(Path(of, "metrics.json").read_text())["n"] >= prior["val"]


def make_earlier(folder: Path) -> None:
    """Turn a run into one of a version that had no seed of the split and listed no images."""
    config = OmegaConf.load(folder / "config.yaml")
    for key in ("split_seed", "split_at"):
        config.data.pop(key, None)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    file = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["codegrid"]["config"]["data"] = OmegaConf.to_container(config.data)
    torch.save(checkpoint, file)
    (folder / "images.npz").unlink(missing_ok=True)
    start = json.loads((folder / "record.jsonl").read_text().splitlines()[-1])
    del start["data"]["images"]
    start["data"]["hash"] = "0"
    (folder / "record.jsonl").write_text(json.dumps(start) + "\n")


@pytest.mark.slow
def test_a_run_of_an_earlier_version_keeps_its_split_and_warns_of_a_grown_folder(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stage=vqgan", "data=folder", f"data.root={photos}", "data.n_val=4", *TINY_FOLDER]
    assert command(*line, "seed=3", "data.split_seed=null") == 0
    folder = Path("runs/vqgan/photos")
    before = read_data(str(folder))
    make_earlier(folder)
    assert command("stage=vqgan", f"resume={folder}", "trainer.max_steps=8") == 0
    assert read_data(str(folder))["hash"] == before["hash"]
    make_earlier(folder)
    grow(photos, 2)
    capsys.readouterr()
    assert command("stage=evaluate", f"ckpt={folder}", *PLAIN) == 0
    printed = capsys.readouterr().err
    assert "train has 14 instead of 12 images" in printed
    assert "images that it was trained on may validate now" in printed


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
