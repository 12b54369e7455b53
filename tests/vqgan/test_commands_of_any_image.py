"""From files of any kind to a trained, evaluated and exported tokenizer, by command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.form import Form
from tests.helpers.commands import QUICK, TINY_GAN, Command, lightning_warnings
from vqgan.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, lightning_warnings]

WORDS = [word for word in TINY_GAN if not word.startswith(("data.n_", "data.image", "model.grid"))]
Values = NDArray[Any]


def draw_waves(index: int, size: tuple[int, int], channels: int) -> Values:
    """Smooth waves (h, w, c) in [0, 1], with a little noise."""
    random = np.random.default_rng(index)
    rows, columns = np.mgrid[: size[0], : size[1], :channels][:2]
    phases = random.uniform(0, 6, (2, channels))
    waves = np.sin(rows / 5 + phases[0]) + np.cos(columns / 7 + phases[1])
    return (waves + 2) / 4 * 0.95 + random.uniform(0, 0.05, waves.shape)


def write_bands(file: Path, index: int) -> Values:
    """Five bands of 16 bits, of which 12 are used, side by side or one page each."""
    values = np.rint(draw_waves(index, (48, 80), 5) * 4095).astype(np.uint16)
    if index % 2:
        tifffile.imwrite(
            file.with_suffix(".tif"), values, photometric="minisblack", planarconfig="contig"
        )
    else:
        tifffile.imwrite(
            file.with_suffix(".tif"), np.moveaxis(values, -1, 0), photometric="minisblack"
        )
    return values


def write_slice(file: Path, index: int) -> Values:
    """Grey values of 12 bits."""
    values = np.rint(draw_waves(index, (32, 32), 1) * 4095).astype(np.uint16)
    Image.fromarray(values[..., 0]).save(file.with_suffix(".png"))
    return values


def write_floats(file: Path, index: int) -> Values:
    """Two channels of floating-point numbers, the first around 0."""
    values = ((draw_waves(index, (32, 48), 2) - [0.5, 0]) * [3.0, 0.01]).astype(np.float32)
    np.save(file.with_suffix(".npy"), values)
    return values


def write_sprite(file: Path, index: int) -> Values:
    """Colours and alpha of 8 bits."""
    values = np.rint(draw_waves(index, (24, 40), 4) * 255).astype(np.uint8)
    Image.fromarray(values).save(file.with_suffix(".png"))
    return values


KINDS: dict[str, tuple[Callable[[Path, int], Values], tuple[int, int], int, list[str]]] = {
    "bands": (write_bands, (48, 80), 5, ["data.show=[3,2,1]"]),
    "slices": (write_slice, (32, 32), 1, []),
    "floats": (write_floats, (32, 48), 2, ["data.range=[[-2,2],[0,0.01]]"]),
    "sprites": (write_sprite, (24, 40), 4, []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_train_a_tokenizer_that_is_judged_exported_and_used(
    kind: str, command: Command, tmp_path: Path
) -> None:
    write, size, channels, words = KINDS[kind]
    folder = tmp_path / kind
    folder.mkdir()
    values = [write(folder / f"{i:02}", i) for i in range(24)]
    grid = tuple(side // 8 for side in size)
    sizes = [f"data.image_size=[{size[0]},{size[1]}]", f"model.grid=[{grid[0]},{grid[1]}]"]
    data = ["data=folder", f"data.root={kind}", f"data.channels={channels}", "data.n_val=8"]
    assert command("stage=vqgan", *data, *sizes, *words, *WORDS, "run_dir=run") == 0
    with Image.open(tmp_path / "run" / "pictures" / "reconstructions-000006.png") as picture:
        assert picture.size == (2 * (8 * (size[1] + 2) - 2), 2 * (2 * (size[0] + 2) - 2))
    assert command("stage=evaluate", "ckpt=run", *QUICK, "run_dir=judged") == 0
    figures = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    assert figures["n"] == 8
    assert figures["psnr"] > 10
    assert command("stage=export", "ckpt=run", "run_dir=out") == 0
    codes = []
    for source in ("run", "out"):
        tokenizer = Tokenizer.from_pretrained(tmp_path / source)
        assert tokenizer.form == Form(size, channels)
        codes.append(tokenizer.encode_images(sorted(folder.iterdir())))
        assert torch.equal(codes[-1], tokenizer.encode_images(values))
        decoded = tokenizer.decode_codes(codes[-1], output="array")
        assert isinstance(decoded, np.ndarray)
        assert (decoded.dtype, decoded.shape) == (values[0].dtype, (24, *size, channels))
        reach = np.ptp(np.stack(values), (0, 1, 2))
        errors = np.abs(decoded.astype(float) - np.stack(values)).mean((0, 1, 2)) / reach
        assert errors.max() < 0.3  # of the range: in the units of the files
    assert torch.equal(*codes)
