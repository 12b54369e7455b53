"""Large pictures by tiles: exact where networks read a known distance, without seams elsewhere."""

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan import tiling
from vqgan.networks.pyramid import PositionAttention, PyramidDecoder, PyramidEncoder
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.vq import VQ
from vqgan.tiling import Tiling, measure_reach, plan_spans, weigh_span
from vqgan.tokenizer import Tokenizer

PLANS = [
    (7, 8, 1),
    (8, 8, 1),
    (9, 8, 1),
    (40, 8, 1),
    (41, 12, 3),
    (100, 16, 2),
    (33, 32, 4),
    (50, 10, 0),
]


@pytest.mark.parametrize(("side", "tile", "margin"), PLANS)
def test_spans_cover_a_side_with_cores_that_do_not_overlap_and_margins_around_them(
    side: int, tile: int, margin: int
) -> None:
    spans = plan_spans(side, tile, margin)
    assert [n for span in spans for n in range(span.core_start, span.core_stop)] == [*range(side)]
    for span in spans:
        assert span.stop - span.start == min(side, tile)
        assert span.start == 0 or span.core_start - span.start >= margin
        assert span.stop == side or span.stop - span.core_stop >= margin


@pytest.mark.parametrize(("side", "tile", "margin"), PLANS)
@pytest.mark.parametrize("blends", [False, True])
def test_the_weights_of_all_tiles_add_up_to_one(
    side: int, tile: int, margin: int, blends: bool
) -> None:
    total = torch.zeros(3 * side)
    for span in plan_spans(side, tile, margin):
        weights = weigh_span(span, 3, margin if blends else 0)
        assert weights.min() >= 0
        total[3 * span.start : 3 * span.stop] += weights
    torch.testing.assert_close(total, torch.ones(3 * side))


class Convolutions(nn.Sequential):
    """f=2 and back; a code reaches two codes in each direction of a map that is halved, and one in the map that is doubled."""

    def __init__(self, halves: bool) -> None:
        around = [nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 1)] if halves else []
        after = (
            []
            if halves
            else [nn.ConvTranspose2d(5, 4, 2, 2), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1)]
        )
        inner = [nn.Conv2d(5, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 5, 3, padding=1)]
        super().__init__(*around, *(inner if halves else inner[:1]), *after)


def make_tiling(halves: bool, tile: int) -> tuple[Tiling, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2 * 30, 2 * 21) if halves else torch.randn(2, 5, 30, 21)
    return Tiling(Convolutions(halves).requires_grad_(False), (2, 1) if halves else (1, 2), tile), x


@pytest.mark.parametrize(("halves", "reach"), [(True, 2), (False, 2)])
def test_convolutions_by_tiles_equal_those_of_the_whole_picture(halves: bool, reach: int) -> None:
    by_tiles, x = make_tiling(halves, 9)
    assert measure_reach(by_tiles.run, x[..., :18, :18], by_tiles.units) == reach
    torch.testing.assert_close(by_tiles(x), by_tiles.run(x), rtol=1e-5, atol=1e-6)


def test_tiles_that_overlap_by_less_than_the_reach_would_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_tiles, x = make_tiling(halves=True, tile=9)
    monkeypatch.setattr(tiling, "measure_reach", lambda *_: 1)
    assert not torch.allclose(by_tiles(x), by_tiles.run(x), rtol=1e-5, atol=1e-6)


def make_pyramid(quantizer: Any = None, **settings: Any) -> Tokenizer:
    """f=4, with attention at the grid's resolution and random weights everywhere."""
    torch.manual_seed(0)
    size = {"image_size": 32, "channels": 3, "grid": 8, "width": 8, "mults": [1, 1, 2], "depth": 1}
    size |= {"attention": [8], "z_channels": 8, "groups": 4}
    decoder = PyramidDecoder(**size)
    nn.init.normal_(decoder.last.weight, std=0.05)
    quantizer = quantizer or make(VQ, K=16, dim=4)
    return Tokenizer(PyramidEncoder(**size), quantizer, decoder, "random").eval()


def test_attention_and_normalisations_read_the_whole_tile() -> None:
    x = torch.randn(1, 8, 12, 12)
    for layer in (nn.GroupNorm(2, 8), PositionAttention(8, 4)):
        assert measure_reach(nn.Sequential(layer), x, (1, 1)) is None
    assert measure_reach(nn.Sequential(nn.Conv2d(8, 8, 5, padding=2)), x, (1, 1)) == 2


def measure_seams(tokenizer: Tokenizer, borders: list[int]) -> list[float]:
    """How much a picture decoded by tiles differs from the whole one: the jump of this difference across each border between
    columns, as a multiple of the jumps between the columns near it."""
    coarse = torch.rand(1, 4, 5, 9, generator=torch.Generator().manual_seed(1))
    z_q = F.interpolate(coarse, size=(20, 40), mode="bicubic")
    with torch.no_grad():
        difference = Tiling(tokenizer.decode, (1, 4), 16)(z_q) - tokenizer.decode(z_q)
    jumps = difference.diff(dim=3).abs().mean((0, 1, 2))
    return [float(9 * jumps[n] / jumps[n - 4 : n + 5].sum()) for n in borders]


def test_blended_tiles_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pictures differ from the whole one, but no more at the tiles' borders than beside them; cut hard, they would."""
    tokenizer = make_pyramid()
    borders = [4 * span.core_start - 1 for span in plan_spans(40, 16, 2)[1:]]
    assert max(measure_seams(tokenizer, borders)) < 1
    monkeypatch.setattr(tiling, "weigh_span", lambda span, unit, _: weigh_span(span, unit, 0))
    assert min(measure_seams(tokenizer, borders)) > 1.5


def test_no_tile_is_larger_than_asked_for() -> None:
    tokenizer = make_pyramid()
    sizes: list[tuple[int, ...]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(tuple(inputs[0].shape))

    tokenizer.encoder.register_forward_pre_hook(note)
    tokenizer.decoder.register_forward_pre_hook(note)
    images = torch.rand(2, 3, 70, 100) * 2 - 1
    codes = tokenizer.encode_images(images, size="own", tile=33)
    assert codes.shape == (2, 18, 25)
    assert {size[2:] for size in sizes} == {(32, 32)}
    sizes.clear()
    decoded = tokenizer.decode_codes(codes, output="tensor", size=(70, 100), tile=33)
    assert decoded.shape == (2, 3, 70, 100)  # type: ignore[union-attr]
    assert {size[0:1] + size[2:] for size in sizes} == {(1, 8, 8)}


@pytest.mark.parametrize("tile", [40, "auto"])
def test_images_that_fit_into_a_tile_are_taken_whole(tile: int | str) -> None:
    tokenizer = make_pyramid()
    images = torch.rand(3, 3, 36, 40) * 2 - 1
    codes = tokenizer.encode_images(images, size="own", tile=tile)
    assert torch.equal(codes, tokenizer.encode_images(images, size="own"))
    whole = tokenizer.decode_codes(codes, output="tensor")
    assert torch.equal(tokenizer.decode_codes(codes, output="tensor", tile=tile), whole)  # type: ignore[arg-type]


def test_several_codebooks_are_encoded_and_decoded_by_tiles() -> None:
    inner = partial(make, VQ)
    tokenizer = make_pyramid(make(Residual, inner, K=16, num_codebooks=2, dim=4))
    codes = tokenizer.encode_images(torch.rand(1, 3, 64, 64), size="own", tile=32)
    assert codes.shape == (1, 16, 16, 2)
    assert tokenizer.decode_codes(codes, output="tensor", tile=32).shape == (1, 3, 64, 64)  # type: ignore[union-attr]


def test_patches_are_added_by_tiles_as_well() -> None:
    """A tokenizer that starts as classical vector quantization has networks that add nothing yet, and so is exact."""
    tokenizer = make_tokenizer().eval()
    images = torch.rand(20, 3, 16, 16) * 2 - 1
    tokenizer.initialise(images)
    large = torch.rand(1, 3, 40, 56) * 2 - 1
    codes = tokenizer.encode_images(large, size="own")
    assert torch.equal(tokenizer.encode_images(large, size="own", tile=16), codes)
    whole = tokenizer.decode_codes(codes, output="tensor")
    tiles = tokenizer.decode_codes(codes, output="tensor", tile=16)
    torch.testing.assert_close(tiles, whole)


@pytest.mark.parametrize(
    ("tile", "sentence"),
    [
        ("large", "tile=large must be auto, or pixels of a side"),
        (15, "tile=15 must be at least 16 pixels, 4 codes of f=4"),
        (0, "tile=0 must be a whole number of at least 1 pixel"),
        (True, "tile=True must be a whole number"),
    ],
)
def test_a_tile_that_can_not_work_is_refused(tile: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        make_pyramid().encode_images(torch.zeros(3, 64, 64), size="own", tile=tile)


def test_networks_of_one_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_pyramid()
    monkeypatch.setattr(PyramidDecoder, "sized_settings", ())
    with pytest.raises(
        InputError, match=r"PyramidDecoder serves images of 32 pixels alone; leave tile out"
    ):
        tokenizer.decode_codes(torch.zeros(1, 16, 16, dtype=torch.int64), tile=32)


@pytest.mark.parametrize("tile", [None, 32])
def test_sides_that_f_does_not_divide_are_refused_by_tiles_as_without(tile: int | None) -> None:
    with pytest.raises(InputError, match="sides that f=.* crop or resize them to 64x64"):
        make_pyramid().indices(torch.zeros(1, 3, 65, 67), tile)


@pytest.mark.parametrize("tile", [None, 32])
def test_no_codes_become_no_images(tile: int | None) -> None:
    codes = torch.zeros(0, 16, 16, dtype=torch.int64)
    assert make_pyramid().decode_indices(codes, tile).shape == (0, 3, 64, 64)
