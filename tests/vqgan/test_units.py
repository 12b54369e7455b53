"""Values of a dataset through store, loader and a tokenizer that loses nothing, and back in their own units."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from codegrid.data.folder import Folder
from tests.helpers.configs import compose_plain
from tests.helpers.images import make_images
from vqgan.load import build_tokenizer, start_images
from vqgan.tokenizer import Tokenizer

SIZE = (8, 12)


def make_lossless(data: Folder) -> Tokenizer:
    """A tokenizer with bottleneck none at its start, whose code of a patch holds all of the patch."""
    size, dim = f"[{SIZE[0]},{SIZE[1]}]", data.channels * 4
    config = compose_plain(
        "stage=vqgan", f"data.image_size={size}", f"data.channels={data.channels}", "model.grid=[4,6]", "model.width=8",
        "model.encoder.depth=1", "model.decoder.depth=1", "quantizer=none", f"quantizer.dim={dim}",
    )  # fmt: skip
    tokenizer = build_tokenizer(config["model"], config["quantizer"])
    tokenizer.initialise(start_images(data))
    tokenizer.rules = data.rules
    return tokenizer.eval()


def write(root: Path, values: NDArray[Any]) -> None:
    root.mkdir()
    for i, image in enumerate(values):
        planes = np.moveaxis(image, -1, 0)  # a page each
        tifffile.imwrite(root / f"{i:02}.tif", planes.squeeze(), photometric="minisblack")


@pytest.mark.parametrize(
    ("kind", "low", "high", "channels", "value_range"),
    [
        ("uint16", 0, 65_535, 5, "auto"),
        ("uint16", 0, 4095, 1, "auto"),
        ("int16", -1024, 3071, 1, [-1024, 3071]),
        ("float32", -3.7, 2.5, 2, "auto"),
        ("float32", -3.7, 2.5, 2, [[-3.7, 2.5], [-4, 4]]),
    ],
)
@torch.no_grad()
def test_values_come_back_within_half_a_step_where_nothing_is_lost(
    tmp_path: Path, kind: str, low: float, high: float, channels: int, value_range: Any
) -> None:
    values = np.random.default_rng(0).uniform(low, high, (16, *SIZE, channels)).astype(kind)
    write(tmp_path / "images", values)
    settings: dict[str, Any] = {"image_size": list(SIZE), "channels": channels, "n_val": 4}
    settings |= {"held_out": "last", "cache_dir": str(tmp_path / "cache"), "range": value_range}
    data = make_images(Folder, str(tmp_path / "images"), **settings)
    data.prepare_data()
    tokenizer = make_lossless(data)
    for batch in data.val_dataloader():
        x, _ = data.on_after_batch_transfer(batch, 0)
        x_hat = tokenizer.decode(tokenizer.encode(x).z_q)
        back = tokenizer.rules.to_units(x_hat).transpose(0, 2, 3, 1)
        assert back.dtype == kind
        steps = np.array([(top - least) / 65_535 for least, top in data.rules.ranges])
        error = np.abs(back.astype(np.float64) - values[-4:])
        # Whole numbers are rounded, and a rotation in float32 costs less than their half step.
        assert (error <= (0.75 * steps if kind == "float32" else 0.5)).all()
