"""Pictures of a script or notebook to codes and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.images import to_float
from codegrid.data.pixels import PixelRules
from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan.networks.decoder import Decoder
from vqgan.networks.encoder import Encoder
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.none import Plain
from vqgan.quantizers.residual import Residual
from vqgan.tokenizer import Tokenizer


def make_pixels(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return make_tokenizer(16, 4, start="random").eval()


def test_a_file_an_image_an_array_and_tensors_of_one_picture_have_the_same_codes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pixels = make_pixels(16, 16)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    bytes_first = torch.from_numpy(pixels).movedim(-1, 0)
    pictures = [
        tmp_path / "picture.png", str(tmp_path / "picture.png"), Image.fromarray(pixels), pixels, bytes_first,
        to_float(bytes_first),
    ]  # fmt: skip
    codes = tokenizer.encode_images(pictures)
    assert codes.shape == (6, 4, 4)
    expected = tokenizer.indices(to_float(bytes_first)[None])
    assert all(torch.equal(each, expected[0]) for each in codes)


def test_a_single_picture_and_batches_are_read_too(tokenizer: Tokenizer) -> None:
    pixels = np.stack([make_pixels(16, 16, seed) for seed in range(5)])
    codes = tokenizer.encode_images(pixels)
    assert torch.equal(codes, tokenizer.encode_images(list(pixels), batch_size=2))
    assert torch.equal(codes[:1], tokenizer.encode_images(pixels[0]))
    assert torch.equal(
        codes, tokenizer.encode_images(to_float(torch.tensor(pixels).movedim(-1, 1)))
    )
    assert tokenizer.encode_images([]).shape == (0, 4, 4)


def test_pictures_of_other_sizes_are_scaled_and_cropped_as_in_training(
    tokenizer: Tokenizer,
) -> None:
    wide = np.repeat(np.repeat(make_pixels(16, 16), 2, 0), 2, 1)
    wide = np.concatenate([np.zeros((32, 8, 3), np.uint8), wide, np.zeros((32, 8, 3), np.uint8)], 1)
    middle = np.asarray(Image.fromarray(wide[:, 8:-8]).resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.equal(tokenizer.encode_images(wide), tokenizer.encode_images(middle))


def test_codes_become_pictures_and_tensors(tokenizer: Tokenizer) -> None:
    codes = torch.randint(16, (3, 4, 4))
    x = tokenizer.decode_codes(codes, output="tensor", batch_size=2)
    assert torch.equal(x, tokenizer.decode_indices(codes).clamp(-1, 1))
    pictures = tokenizer.decode_codes(codes)
    assert [picture.size for picture in pictures] == [(16, 16)] * 3
    pixels = torch.from_numpy(np.array(pictures[0])).movedim(-1, 0)
    assert (to_float(pixels) - x[0]).abs().max() <= 1 / 255 + 1e-6


def test_other_grids_than_that_of_training_are_decoded(tokenizer: Tokenizer) -> None:
    [picture] = tokenizer.decode_codes(torch.zeros(1, 2, 6, dtype=torch.int32))
    assert picture.size == (24, 8)


def test_grey_tokenizers_give_grey_pictures() -> None:
    tokenizer = make_tokenizer(16, 4, start="random", channels=1).eval()
    codes = tokenizer.encode_images(make_pixels(20, 20))
    [picture] = tokenizer.decode_codes(codes)
    assert picture.mode == "L"


def test_several_codebooks_have_an_axis_of_their_own() -> None:
    parts = {
        "image_size": 16, "channels": 3, "grid": 4, "width": 8, "depth": 1, "stem": 4, "max_width_mult": 4,
    }  # fmt: skip
    quantizer = Residual(lambda K, dim: make(EMA, K, dim), 16, 2, 8, 0.0)
    tokenizer = Tokenizer(Encoder(**parts), quantizer, Decoder(**parts), "random").eval()
    codes = tokenizer.encode_images([make_pixels(16, 16)])
    assert codes.shape == (1, 4, 4, 2)
    assert tokenizer.decode_codes(codes, output="tensor").shape == (1, 3, 16, 16)


def test_the_rules_of_training_decide_how_deep_pixels_are_read(tokenizer: Tokenizer) -> None:
    deep = Image.fromarray(np.full((16, 16), 300, np.uint16))
    dark = tokenizer.encode_images(deep)
    tokenizer.rules = PixelRules((0, 300))
    assert torch.equal(
        tokenizer.encode_images(deep), tokenizer.encode_images(np.full((16, 16), 255, np.uint8))
    )
    assert torch.equal(dark, tokenizer.encode_images(np.full((16, 16), 1, np.uint8)))


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("nowhere.png", "nowhere.png can't be read as an image"),
        (np.zeros((16, 16, 3)), r"shape \[16, 16, 3\] and type float64 is no image; give uint8"),
        (np.zeros((16, 16, 5), np.uint8), r"shape \[16, 16, 5\] and type uint8 is no image"),
        (torch.full((3, 16, 16), 255.0), r"values from 255 to 255 must be in \[-1, 1\]; divide"),
        (torch.full((3, 16, 16), torch.nan), "values from nan to nan"),
        (torch.zeros(16, 16), r"a tensor of shape \[16, 16\] is no image here; give \(3, H, W\)"),
        ([7], "a int is no image; give a path, a Pillow image, an array or a tensor"),
    ],
)
def test_what_is_no_picture_gets_a_sentence(
    tokenizer: Tokenizer, picture: Any, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        tokenizer.encode_images(picture)


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (torch.zeros(4, 4, dtype=torch.int64), r"codes of shape \[4, 4\] must be \(B, h, w\)"),
        (torch.zeros(0, 4, 4, dtype=torch.int64), "at least one grid"),
        (torch.zeros(1, 4, 4), "codes of type torch.float32 must be whole numbers"),
        (torch.full((1, 4, 4), 16), "codes from 16 to 16 must be 0 to 15"),
        (torch.full((1, 4, 4), -1), "codes from -1 to -1 must be 0 to 15"),
    ],
)
def test_what_are_no_codes_gets_a_sentence(
    tokenizer: Tokenizer, codes: torch.Tensor, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        tokenizer.decode_codes(codes)


def test_settings_that_can_not_work_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="output=numpy must be one of pil, tensor"):
        tokenizer.decode_codes(torch.zeros(1, 4, 4, dtype=torch.int64), output="numpy")
    with pytest.raises(InputError, match="batch_size=0 must be a whole number of at least 1"):
        tokenizer.encode_images([], batch_size=0)


def test_a_continuous_tokenizer_has_no_codes() -> None:
    usual = make_tokenizer(16, 4, start="random")
    tokenizer = Tokenizer(usual.encoder, Plain(8), usual.decoder, "random")
    for call in (tokenizer.encode_images, tokenizer.decode_codes):
        with pytest.raises(InputError, match="this tokenizer is continuous"):
            call(torch.zeros(1, 3, 16, 16))
