"""Commands that build on a run of more than 8 bits read images as it recorded."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.commands import Command, lightning_warnings

pytestmark = [lightning_warnings, pytest.mark.slow]

SMALL = [
    "data=folder", "data.root=slices", "data.n_val=4", "data.held_out=last", "data.batch_size=4", "data.channels=1",
    "data.image_size=[8,16]", "model.grid=[2,4]", "model.width=8", "model.encoder.depth=1", "model.decoder.depth=1",
    "quantizer.K=16", "quantizer.dim=8", "trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_every=2",
    "trainer.save_every=2", "logger=csv", "~loss/adversarial", "name=scans",
]  # fmt: skip


def save_slices(folder: Path, highest: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    for i, value in enumerate(highest):
        slice_ = np.random.default_rng(i).integers(0, value, (8, 16), np.uint16)
        Image.fromarray(slice_).save(folder / f"{i:02}.png")


def read_data(folder: str) -> dict[str, Any]:
    return dict(OmegaConf.load(Path(folder) / "config.yaml").data)


def test_a_run_of_sixteen_bits_is_resumed_and_judged_by_the_range_that_it_recorded(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    save_slices(tmp_path / "slices", [900] * 12)
    assert command("stage=vqgan", *SMALL) == 0
    recorded = read_data("runs/vqgan/scans")
    decided = {"range": [0, 1023], "depth": 16, "number_type": "uint16"}
    assert {name: recorded[name] for name in decided} == decided
    capsys.readouterr()
    save_slices(tmp_path / "slices", [900] * 11 + [3000])
    assert command("stage=vqgan", "resume=runs/vqgan/scans", "trainer.max_steps=4") == 0
    assert {**read_data("runs/vqgan/scans")} == recorded
    plain = ["accelerator=cpu", "proxy=0", "inception=false", "fetch=false", "references=false"]
    assert command("stage=evaluate", "ckpt=runs/vqgan/scans", "run_dir=judged", *plain) == 0
    cut = (
        r"1 images have values beyond data\.range=\[0,1023\], from \d+ to 2,\d+, which are cut off"
    )
    assert re.search(cut, capsys.readouterr().err)
    assert json.loads(Path("judged/metrics.json").read_text())["psnr"] > 0
