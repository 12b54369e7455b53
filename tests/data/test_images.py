from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.images import to_depth, to_float, to_model_input, to_uint8
from codegrid.data.pictures import save_picture, show_picture, tile_images
from codegrid.engine.lightning_doors import stand_in_loop


def test_to_uint8_inverts_to_float_for_every_value() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


@pytest.mark.parametrize("kind", [np.int32, np.uint16])
def test_sixteen_bits_invert_to_float_for_every_value(kind: type) -> None:
    every = np.arange(2**16).astype(kind)
    x = to_float(torch.from_numpy(every))
    assert torch.equal(to_depth(x, 16), torch.arange(2**16, dtype=torch.int32))
    assert (x[0], x[-1]) == (-1, 1)


def test_a_depth_of_eight_bits_is_uint8() -> None:
    x = torch.rand(1000) * 2.2 - 1.1
    assert torch.equal(to_depth(x, 8), to_uint8(x))
    assert to_depth(torch.tensor([-3.0, 3.0]), 16).tolist() == [0, 65_535]


def test_both_depths_of_an_image_are_the_same_for_a_model() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    deep = to_model_input(images.int() * 257)
    assert (deep - to_model_input(images)).abs().max() < 1e-6
    assert deep.is_contiguous(memory_format=torch.channels_last)


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


def test_the_caption_of_a_picture_is_in_its_file(tmp_path: Path) -> None:
    sheet = torch.zeros(3, 4, 6, dtype=torch.uint8)
    caption = "Shown: channels 3, 2, 1 of 5; from black to white 0 to 4,095."
    with Image.open(save_picture(sheet, tmp_path / "a.png", caption)) as picture:
        assert picture.info["Description"] == caption
    with Image.open(save_picture(sheet, tmp_path / "b.png")) as picture:
        assert "Description" not in picture.info


def test_a_logger_of_pictures_gets_the_caption_where_there_is_one(tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    logger = SimpleNamespace(log_image=lambda **words: logged.append(words))
    trainer: Any = SimpleNamespace(loggers=[logger], fit_loop=stand_in_loop())
    sheet = torch.zeros(3, 4, 6, dtype=torch.uint8)
    for caption in ("Shown: channel 2 of 5.", ""):
        show_picture(trainer, sheet, tmp_path, "a", 7, caption)
    assert [words.get("caption") for words in logged] == [["Shown: channel 2 of 5."], None]
    assert logged[0]["images"][0].shape == (4, 6, 3)
