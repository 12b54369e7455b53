"""Public weights of colour images serve bands, by command: import, further training, and images of any size from Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from codegrid.data.form import Form
from tests.helpers.commands import Command, lightning_warnings
from tests.helpers.public import PUBLIC
from vqgan.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated"),  # of lpips
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum"),
]


def write_bands(folder: Path) -> list[NDArray[Any]]:
    """Files of 48x80 pixels with five bands of 12 bits, side by side or a page each."""
    folder.mkdir()
    pictures = []
    for i in range(20):
        rows, columns = np.mgrid[:48, :80, :5][:2]
        phases = np.random.default_rng(i).uniform(0, 6, (2, 5))
        waves = np.sin(rows / 5 + phases[0]) + np.cos(columns / 7 + phases[1])
        pictures.append(np.rint((waves + 2) / 4 * 4000).astype(np.uint16))
        planes = pictures[i] if i % 2 else np.moveaxis(pictures[i], -1, 0)
        layout = {"planarconfig": "contig"} if i % 2 else {}
        tifffile.imwrite(folder / f"{i:02}.tif", planes, photometric="minisblack", **layout)
    return pictures


def test_public_weights_of_colours_serve_bands(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = write_bands(tmp_path / "bands")
    data = [
        "data=folder", "data.root=bands", "data.channels=5", "data.image_size=[48,80]", "data.n_val=4", "data.show=[5,3,1]",
    ]  # fmt: skip
    source = f"from={PUBLIC / 'taming_vq' / 'last.ckpt'}"
    assert command("stage=import", source, *data, "accelerator=cpu", "run_dir=public") == 0
    about = json.loads((tmp_path / "public" / "metrics.json").read_text())
    assert "has 3 channels and the images 5: the first and the last" in about["remarks"][-1]
    capsys.readouterr()
    words = [
        "loss/perceptual=lpips", "loss.perceptual.net=squeeze", "loss.perceptual.pretrained=false", "trainer.max_steps=2",
        "data.batch_size=2", "trainer.accelerator=cpu", "logger=csv",
    ]  # fmt: skip
    assert command("stage=vqgan", "init=public", *data, *words, "run_dir=tuned") == 0
    printed = capsys.readouterr().err
    assert "init=public: PyramidEncoder with 64 codes, [48,80] pixels to a grid of 12x20" in printed
    assert "loss.perceptual reads three colours and sees channels 5, 3 and 1 alone" in printed
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tuned")
    assert tokenizer.form == Form((48, 80), 5)
    codes = tokenizer.encode_images([tmp_path / "bands" / "00.tif", tmp_path / "bands" / "01.tif"])
    assert torch.equal(codes, tokenizer.encode_images(values[:2]))
    part = values[0][:45, :77]
    codes = tokenizer.encode_images(part, size="own")
    assert codes.shape == (1, 12, 20)
    decoded = tokenizer.decode_codes(codes, output="array", size=(45, 77))
    assert isinstance(decoded, np.ndarray)
    assert (decoded.dtype, decoded.shape) == (np.uint16, (1, 45, 77, 5))
    assert (
        np.abs(decoded[0].astype(float) - part).mean() < 1000
    )  # of 4,095: in the units of the data
