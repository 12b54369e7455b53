"""The picture and the scores that an import shows at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_noise
from vqgan.formats.preview import Preview
from vqgan.networks.base import ImageDecoder, ImageEncoder
from vqgan.quantizers.none import Plain
from vqgan.tokenizer import Tokenizer

CPU = torch.device("cpu")


class Same(ImageEncoder):
    exit_kernel = 0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image_size, self.channels, self.out_channels = size, 3, 3
        self.grid, self.f = (size, size), 1
        self.layers = torch.nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Squared(ImageDecoder):
    """The image, as long as no value is below 0."""

    entry_kernel = 0

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = 3
        self.layers = torch.nn.Identity()
        self.last = torch.nn.Conv2d(3, 3, 1)

    def forward(self, h: Tensor) -> Tensor:
        return h.clamp(min=0)


def make_half_blind(size: int, pixels: tuple[int, int]) -> Tokenizer:
    return Tokenizer(Same(size), make(Plain, dim=3), Squared(), "random", pixels)


def test_a_range_that_is_clearly_closer_is_named() -> None:
    data = make_noise()
    wrong = Preview(make_half_blind(data.image_size, (-1, 1)), data, 3, CPU)
    [remark] = wrong.remarks
    assert "with pixels=[0,1] and " in remark
    assert "with pixels=[-1,1], which this run has" in remark
    right = Preview(make_half_blind(data.image_size, (0, 1)), data, 3, CPU)
    assert right.remarks == []
    assert right.scores["psnr"] > wrong.scores["psnr"] + 20


def test_the_range_stays_as_it_was() -> None:
    data = make_noise()
    tokenizer = make_half_blind(data.image_size, (-1, 1))
    Preview(tokenizer, data, 3, CPU)
    assert tokenizer.pixels == (-1, 1)


def test_the_picture_has_each_image_above_its_reconstruction(tmp_path: Path) -> None:
    data = make_noise()
    preview = Preview(make_half_blind(data.image_size, (0, 1)), data, 3, CPU)
    [file] = preview.save(tmp_path)
    sheet = np.asarray(Image.open(file))
    scale = len(sheet) // 34  # two rows of 16 pixels and a gap of 2
    assert (sheet[: 16 * scale] == sheet[18 * scale :]).all()
    assert sheet[: 16 * scale].std() > 10


def test_no_image_is_shown_with_0(tmp_path: Path) -> None:
    preview = Preview(make_half_blind(8, (0, 1)), make_noise(), 0, CPU)
    assert (preview.scores, preview.save(tmp_path)) == ({}, [])
    with pytest.raises(InputError, match="show=-1 must be a whole number of at least 0"):
        Preview(make_half_blind(8, (0, 1)), make_noise(), -1, CPU)
