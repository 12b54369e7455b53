from pathlib import Path

import numpy as np
import torch
from PIL import Image

from codegrid.data.images import to_float, to_uint8
from codegrid.data.pictures import save_picture, tile_images


def test_to_uint8_inverts_to_float_for_every_value() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


def test_the_range_is_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_values_beyond_the_range_are_clamped_not_wrapped() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_picture_holds_its_images_where_they_belong() -> None:
    rows = [torch.full((3, 3, 4, 5), 10 * r, dtype=torch.uint8) for r in range(2)]
    sheet = tile_images(rows, gap=1)
    assert sheet.shape == (3, 9, 17)
    assert sheet[:, 0, 0].tolist() == [0, 0, 0]
    assert sheet[:, 5, 0].tolist() == [10, 10, 10]
    assert sheet[:, 4, 0].tolist() == [255, 255, 255]


def test_a_saved_picture_reads_back_exactly_even_grey(tmp_path: Path) -> None:
    grey = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    file = save_picture(tile_images([grey], scale=2), tmp_path / "new" / "grey.png")
    read = np.asarray(Image.open(file))
    assert read.shape == (8, 8, 3)
    assert np.array_equal(read[::2, ::2, 1], grey[0, 0].numpy())
