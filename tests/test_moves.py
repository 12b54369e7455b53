"""Data, caches and run folders that move between the commands of a project, from start to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings

pytestmark = [lightning_warnings, pytest.mark.slow]
TOKENIZER = [
    *(word for word in TINY if "data.n_" not in word), "data=folder", "data.n_val=8", "loss=vqvae",
]  # fmt: skip
EVALUATE = [*QUICK, "inception=false", "lpips=null", "show=2", "batch_size=4"]
SECOND = [
    word if word.startswith("prior.") else f"stage2.{word}"
    for word in TINY_PRIOR
    if "accelerator" not in word and "logger" not in word
]


def paint(root: Path, n: int = 40) -> None:
    """Photos in two class folders, no two alike."""
    random = np.random.default_rng(0)
    for i in range(n):
        file = root / ("cats", "dogs")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(file)


def copy_to(target: str, source: str) -> None:
    """Move files to another disk: they get other times."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    shutil.rmtree(source)


def read(folder: str, name: str = "metrics.json") -> dict[str, object]:
    content: dict[str, object] = json.loads(Path(folder, name).read_text())
    return content


def test_everything_moves_between_all_commands(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(Path("first/photos"))
    assert command("stage=vqgan", *TOKENIZER, "data.root=first/photos", "cache_dir=ram") == 0
    copy_to("second/pictures", "first/photos")
    copy_to("moved", "runs/vqgan/photos")
    there = ["data.root=second/pictures", "cache_dir=disk", "data.num_workers=1", "data.cache=none"]
    assert command("stage=vqgan", "resume=moved", "trainer.max_steps=8", *there) == 0
    assert OmegaConf.load("moved/config.yaml").data.root == "second/pictures"
    assert command("stage=vqgan", "resume=moved", "trainer.max_steps=9") == 0, "it knows the place"
    assert command("stage=prior", *TINY_PRIOR, "ckpt=moved") == 0
    copy_to("third", "second/pictures")
    copy_to("elsewhere", "runs/prior/pictures")
    shutil.rmtree("moved")
    here = "data.root=third"
    assert command("stage=prior", "resume=elsewhere", "trainer.max_steps=8", here) == 0
    assert (
        command("stage=sample", "ckpt=elsewhere", "n=4", "save=neighbours", "accelerator=cpu") == 0
    )
    assert command("stage=evaluate", "ckpt=elsewhere", "samples=8", *EVALUATE) == 0
    assert "the images are not" not in capsys.readouterr().err


def test_a_folder_that_grew_is_named_by_every_command(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(Path("photos"))
    assert command("stage=vqgan", *TOKENIZER, "data.root=photos") == 0
    Image.new("RGB", (20, 20), (1, 2, 3)).save("photos/dogs/new.png")
    capsys.readouterr()
    for words in (
        ["stage=vqgan", "resume=runs/vqgan/photos", "trainer.max_steps=7"],
        ["stage=prior", *TINY_PRIOR, "ckpt=runs/vqgan/photos"],
    ):
        (Path("photos") / "cats" / f"{words[0]}.png").write_bytes(
            Path("photos/cats/0.png").read_bytes() + b" "
        )
        assert command(*words) == 0
        assert (
            "the images are not those that runs/vqgan/photos was trained on"
            in capsys.readouterr().err
        )
    assert command("stage=evaluate", "ckpt=runs/prior/photos", "samples=0", *EVALUATE) == 0
    assert "the images are not" not in capsys.readouterr().err, "the prior was trained on these"


def test_a_pipeline_and_its_data_move_before_it_goes_on(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_off(_: object) -> None:
        raise RuntimeError("the power failed")

    paint(Path("first/photos"))
    quick = [f"evaluate.{word}" for word in EVALUATE if "accelerator" not in word]
    words = ["stage=pipeline", *TOKENIZER, *SECOND, *quick, "evaluate.samples=0"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power failed"):
        patch.setattr("prior.stages.evaluate.evaluate", break_off)
        command(*words, "data.root=first/photos")
    copy_to("second", "first/photos")
    copy_to("moved", "runs/pipeline/photos")
    capsys.readouterr()
    assert command("stage=pipeline", "resume=moved", "data.root=second", "cache_dir=disk") == 0
    printed = capsys.readouterr().err
    assert "moved/tokenizer: finished before" in printed
    assert "moved/prior: finished before" in printed
    assert "the images are not" not in printed
    pictures = read("moved")["pictures"]
    assert isinstance(pictures, list)
    assert all(Path(picture).is_file() for picture in pictures)


def test_a_sweep_goes_on_with_its_data_in_another_place_and_not_with_other_images(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(Path("first"))
    sweep = ["-m", "stage=vqgan", *TOKENIZER, "quantizer.K=8,16"]
    assert command(*sweep, "data.root=first", "sweep=mine") == 0
    Path("runs/sweeps/mine/1_quantizer.K-16/metrics.json").unlink()
    copy_to("second", "first")
    copy_to("moved", "runs/sweeps/mine")
    capsys.readouterr()
    assert command(*sweep, "data.root=second", "hydra.sweep.dir=moved") == 0
    printed = capsys.readouterr().err
    assert "moved/0_quantizer.K-8: finished before" in printed
    assert "moved/1_quantizer.K-16: resumes" in printed
    paint(Path("other"), 30)
    for number, file in enumerate(Path("other").rglob("*.png")):
        file.write_bytes(file.read_bytes() + b" " * (number + 1))
    assert command(*sweep, "data.root=other", "hydra.sweep.dir=moved") == 2
    assert (
        "the images are not those that moved/0_quantizer.K-8 was trained on"
        in capsys.readouterr().err
    )
