"""Pictures of a script or notebook to codes and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.form import FIT_CHOICES
from codegrid.data.images import to_float
from codegrid.data.pixels import PixelRules
from codegrid.data.resize import fit_image
from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan.networks.decoder import Decoder
from vqgan.networks.encoder import Encoder
from vqgan.pictures import pad_to_multiples
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
        (
            np.zeros((16, 16, 3)),
            r"shape \[16, 16, 3\] and type float64 is no image here; give whole",
        ),
        (
            np.zeros((16, 16, 5), np.uint8),
            r"shape \[16, 16, 5\] and type uint8 is no image here; .*\(H, W, 3\) or",
        ),
        (np.zeros((16, 16), bool), "type bool is no image here"),
        (np.zeros((0, 16), np.uint8), r"shape \[0, 16\] and type uint8 is no image here"),
        (np.zeros((16, 16, 2), np.uint16), r"shape \[16, 16, 2\] and type uint16 is no image here"),
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
    with pytest.raises(InputError, match="output=numpy must be one of pil, tensor, array"):
        tokenizer.decode_codes(torch.zeros(1, 4, 4, dtype=torch.int64), output="numpy")
    with pytest.raises(InputError, match="batch_size=0 must be a whole number of at least 1"):
        tokenizer.encode_images([], batch_size=0)


# Images of any size.


def test_images_of_their_own_size_are_padded_by_their_mirror_image(tokenizer: Tokenizer) -> None:
    pixels = make_pixels(21, 30)
    padded = np.pad(pixels, [(0, 3), (0, 2), (0, 0)], mode="reflect")
    codes = tokenizer.encode_images(pixels, size="own")
    assert codes.shape == (1, 6, 8)
    assert torch.equal(codes, tokenizer.encode_images(padded, size="own"))
    x = to_float(torch.from_numpy(padded).movedim(-1, 0))[None]
    assert torch.equal(codes, tokenizer.indices(x))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 9), (8, 8), (16, 16)])
def test_padding_is_numpys_reflection_however_narrow_an_image_is(height: int, width: int) -> None:
    pixels = make_pixels(height, width)
    edges = [(0, -height % 8), (0, -width % 8), (0, 0)]
    expected = np.pad(pixels, edges, mode="reflect")
    padded = pad_to_multiples(torch.from_numpy(pixels).movedim(-1, 0), 8)
    assert np.array_equal(padded.movedim(0, -1).numpy(), expected)


def test_decoded_images_are_cut_to_the_size_that_was_encoded(tokenizer: Tokenizer) -> None:
    codes = tokenizer.encode_images(make_pixels(21, 30), size="own")
    x = tokenizer.decode_codes(codes, output="tensor", size=(21, 30))
    assert torch.equal(x, tokenizer.decode_codes(codes, output="tensor")[..., :21, :30])
    [picture] = tokenizer.decode_codes(codes, size=(21, 30))
    assert picture.size == (30, 21)


def test_files_of_their_own_size_are_read_as_a_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 61 * 95 * 3).reshape(61, 95, 3).astype(np.uint8)
    for ending in ("png", "jpg", "webp"):
        file = tmp_path / f"picture.{ending}"
        Image.fromarray(smooth).save(file)
        with Image.open(file) as image:
            expected = tokenizer.encode_images(np.asarray(image.convert("RGB")), size="own")
        assert expected.shape == (1, 16, 24)
        assert torch.equal(tokenizer.encode_images(file, size="own"), expected)


def test_turned_files_of_their_own_size_are_upright(tokenizer: Tokenizer, tmp_path: Path) -> None:
    image, exif = Image.fromarray(make_pixels(16, 24)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    codes = tokenizer.encode_images(tmp_path / "turned.png", size="own")
    assert codes.shape == (1, 6, 4)
    upright = np.rot90(make_pixels(16, 24), -1).copy()
    assert torch.equal(codes, tokenizer.encode_images(upright, size="own"))


def test_a_size_of_ones_own_is_scaled_to_and_padded(tokenizer: Tokenizer) -> None:
    pixels = make_pixels(50, 100)
    assert tokenizer.encode_images(pixels, size=32).shape == (1, 8, 8)
    codes = tokenizer.encode_images(pixels, size=(18, 36))
    assert codes.shape == (1, 5, 9)
    scaled = np.asarray(Image.fromarray(pixels).resize((36, 18), Image.Resampling.BICUBIC))
    assert torch.equal(codes, tokenizer.encode_images(scaled, size="own"))


@pytest.mark.parametrize("fit", FIT_CHOICES)
def test_images_are_fitted_as_in_training_or_as_one_says(tokenizer: Tokenizer, fit: str) -> None:
    pixels = make_pixels(20, 40)
    fitted = np.asarray(fit_image(Image.fromarray(pixels), (16, 16), fit))
    expected = tokenizer.encode_images(fitted)
    assert torch.equal(tokenizer.encode_images(pixels, fit=fit), expected)
    tokenizer.fit = fit
    assert torch.equal(tokenizer.encode_images(pixels), expected)


def test_sizes_with_codes_of_one_shape_are_one_batch_and_others_are_refused(
    tokenizer: Tokenizer,
) -> None:
    pictures = [make_pixels(14, 15), make_pixels(16, 13), make_pixels(16, 16)]
    codes = tokenizer.encode_images(pictures, size="own", batch_size=2)
    for row, picture in zip(codes, pictures, strict=True):
        assert torch.equal(row, tokenizer.encode_images(picture, size="own")[0])
    with pytest.raises(InputError, match=r"images of 16x16 and 20x16 pixels, padded .* one by one"):
        tokenizer.encode_images([*pictures, make_pixels(17, 16)], size="own", batch_size=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": "full"}, r"size=full must be own, pixels of a side, or \(rows, columns\)"),
        ({"size": 0}, "size=0 must be at least 1 pixel"),
        ({"fit": "zoom"}, "fit=zoom must be one of crop, pad, stretch"),
        ({"size": "own", "fit": "pad"}, "size=own changes no image, so fit=pad says nothing"),
    ],
)
def test_a_size_that_is_none_is_refused(
    tokenizer: Tokenizer, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        tokenizer.encode_images(make_pixels(16, 16), **settings)


@pytest.mark.parametrize("size", [(20, 24), (25, 24), (24, 33), 24, (24, 28)])
def test_a_size_that_other_codes_have_is_refused(tokenizer: Tokenizer, size: Any) -> None:
    codes = torch.zeros(1, 6, 8, dtype=torch.int64)
    with pytest.raises(InputError, match="codes of 6x8 are images of 21 to 24 rows and 29 to 32 c"):
        tokenizer.decode_codes(codes, size=size)


def test_networks_of_one_size_say_so(tokenizer: Tokenizer) -> None:
    class Rigid(Encoder):
        sized_settings = ()

    tokenizer.encoder.__class__ = Rigid
    assert tokenizer.encode_images(make_pixels(16, 16), size="own").shape == (1, 4, 4)
    with pytest.raises(InputError, match="Rigid serves images of 16 pixels alone; leave size out"):
        tokenizer.encode_images(make_pixels(20, 16), size="own")


# Any channels and units.


BANDS = PixelRules((0, 4095), depth=16, show=(3, 2, 1), number_type="uint16")


def make_bands(height: int = 8, width: int = 12) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(0).integers(0, 4096, (height, width, 5), np.uint16)


class Lossless(Tokenizer):
    """Codes that are pixels: one for each of `levels` in each channel, in their order."""

    def __init__(
        self, rules: PixelRules, levels: int, channels: int, size: tuple[int, int]
    ) -> None:
        parts = {
            "image_size": size, "channels": channels, "grid": size, "width": 8, "depth": 1, "stem": 1, "max_width_mult": 1,
        }  # fmt: skip
        quantizer = Residual(lambda K, dim: make(EMA, K, dim), 8, channels, 8, nested=0.0)
        super().__init__(Encoder(**parts), quantizer, Decoder(**parts), "random")
        self.rules, self.top = rules, levels - 1

    @property
    def K(self) -> int:
        return self.top + 1

    def indices(self, x: torch.Tensor, tile: int | str | None = None) -> torch.Tensor:
        return ((x.double() + 1) / 2 * self.top).round().long().movedim(1, -1)

    def decode_indices(
        self,
        indices: torch.Tensor,
        tile: int | str | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        return (indices.movedim(-1, 1).double() / self.top * 2 - 1).float()


def test_bands_of_12_bits_come_back_in_their_own_units() -> None:
    tokenizer, bands = Lossless(BANDS, 4096, 5, (8, 12)), make_bands()
    codes = tokenizer.encode_images([bands, bands[::-1]])
    assert np.array_equal(codes[0], bands)  # 12 bits are whole steps of 16
    values = tokenizer.decode_codes(codes, output="array")
    assert (values.dtype, values.shape) == (np.uint16, (2, 8, 12, 5))
    assert np.array_equal(values[0], bands)
    assert np.array_equal(values[1], bands[::-1])


def test_bands_of_an_own_size_come_back_cut() -> None:
    tokenizer, bands = Lossless(BANDS, 4096, 5, (8, 12)), make_bands(7, 5)
    codes = tokenizer.encode_images(bands, size="own")
    assert np.array_equal(tokenizer.decode_codes(codes, output="array", size=(7, 5))[0], bands)


def test_pictures_show_the_chosen_channels() -> None:
    tokenizer, bands = Lossless(BANDS, 4096, 5, (8, 12)), make_bands()
    [picture] = tokenizer.decode_codes(tokenizer.encode_images(bands))
    assert picture.mode == "RGB"
    expected = np.rint(bands[..., [2, 1, 0]] / 4095 * 255)
    assert np.abs(np.asarray(picture) - expected).max() <= 1


def test_floats_of_two_channels_with_negative_values_keep_their_units() -> None:
    rules = PixelRules(((-2.0, 2.0), (0.0, 0.5)), depth=16, number_type="float32")
    tokenizer = Lossless(rules, 65536, 2, (6, 4))
    values = np.random.default_rng(0).uniform([-2, 0], [2, 0.5], (6, 4, 2)).astype(np.float32)
    codes = tokenizer.encode_images(values)
    again = tokenizer.decode_codes(codes, output="array")[0]
    assert again.dtype == np.float32
    assert (np.abs(again - values).max((0, 1)) <= np.array([4, 0.5]) / 65535 / 2 + 1e-6).all()
    [picture] = tokenizer.decode_codes(codes)
    assert picture.mode == "L"


def test_values_beyond_the_range_are_cut_off_and_bytes_may_be_in_either_order() -> None:
    tokenizer, bands = Lossless(BANDS, 4096, 5, (8, 12)), make_bands()
    high = bands.astype(np.uint16)
    high[0, 0] = 60000
    codes = tokenizer.encode_images([high, high.astype(">u2")])
    assert torch.equal(codes[0], codes[1])
    assert (codes[:, 0, 0] == 4095).all()


def test_float_tensors_of_any_depth_are_scaled_without_losing_bits() -> None:
    tokenizer = Lossless(BANDS, 65536, 5, (8, 12))
    levels = torch.linspace(-1, 1, 9)[None, :, None].expand(5, 9, 13)
    codes = tokenizer.encode_images(levels)
    assert len(codes.unique()) == 8  # rows
    assert (codes.diff(dim=1) > 0).all()
    flat = torch.full((5, 20, 30), 0.123456)
    codes = tokenizer.encode_images(flat)
    expected = round((0.123456 + 1) / 2 * 65535)
    assert (codes == expected).all()


def test_a_tokenizer_of_rgba_takes_alpha_as_a_channel() -> None:
    tokenizer = Lossless(PixelRules(), 256, 4, (6, 10))
    sprite = np.random.default_rng(0).integers(0, 256, (6, 10, 4), np.uint8)
    assert np.array_equal(tokenizer.encode_images(sprite)[0], sprite)
    assert np.array_equal(tokenizer.encode_images(Image.fromarray(sprite))[0], sprite)
    codes = tokenizer.encode_images(torch.from_numpy(sprite).movedim(-1, 0))
    assert np.array_equal(tokenizer.decode_codes(codes, output="array")[0], sprite)


def test_plain_arrays_are_the_pixels_of_the_pictures(tokenizer: Tokenizer) -> None:
    codes = torch.randint(16, (3, 4, 4))
    arrays = tokenizer.decode_codes(codes, output="array")
    for array, picture in zip(arrays, tokenizer.decode_codes(codes), strict=True):
        assert np.array_equal(array, np.asarray(picture))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.float32])
def test_arrays_of_other_types_are_the_same_pixels_of_eight_bits_or_are_refused(
    tokenizer: Tokenizer, dtype: type
) -> None:
    # As every run of 8-bit images records its range and type.
    tokenizer.rules = PixelRules((0, 65535), number_type="uint8")
    pixels = make_pixels(16, 16)
    codes = tokenizer.encode_images(pixels)
    assert torch.equal(tokenizer.encode_images(pixels.astype(dtype)), codes)
    for wrong in (pixels.astype(dtype) * 4, pixels / 255, pixels - 1.0):
        with pytest.raises(InputError, match="must have whole numbers from 0 to 255"):
            tokenizer.encode_images(wrong)


def test_grey_is_taken_for_three_colours_with_a_range_each_and_floats_have_no_alpha(
    tokenizer: Tokenizer,
) -> None:
    tokenizer.rules = PixelRules(((0, 9), (0, 99), (0, 999)), depth=16, number_type="uint16")
    grey = np.zeros((16, 16), np.uint16)
    rgb = np.zeros((16, 16, 3), np.uint16)
    assert torch.equal(tokenizer.encode_images(grey), tokenizer.encode_images(rgb))
    with pytest.raises(InputError, match="is no image here"):
        tokenizer.encode_images(np.zeros((16, 16, 4), np.float32))


def test_a_continuous_tokenizer_has_no_codes() -> None:
    usual = make_tokenizer(16, 4, start="random")
    tokenizer = Tokenizer(usual.encoder, Plain(8), usual.decoder, "random")
    for call in (tokenizer.encode_images, tokenizer.decode_codes):
        with pytest.raises(InputError, match="this tokenizer is continuous"):
            call(torch.zeros(1, 3, 16, 16))
