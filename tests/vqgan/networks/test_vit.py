"""The vision transformer: its layers against slow ones, its settings, and what codes without places mean elsewhere."""

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from codegrid.engine.errors import InputError
from prior import draw
from prior.conditions import check_places
from prior.decoding.sampling import Sampler
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.architecture import Adoption, adopt_architecture
from vqgan.baselines import measure_codecs
from vqgan.losses.gate import Gate
from vqgan.networks.blocks import LayerNorm
from vqgan.networks.vit import (
    FeedForward,
    TokenLayout,
    ViTBlock,
    ViTDecoder,
    ViTEncoder,
    plan_tokens,
    sine_positions,
)
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

SMALL: dict[str, Any] = {
    "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "layout": None, "patch": None, "gated": False, "positions": "sine",
    "tokens": None,
}  # fmt: skip


def make_tokenizer(grid: Any = (1, 5), start: str = "random", **settings: Any) -> Tokenizer:
    """A small one for grey images of 16x16 pixels; five codes without places by default."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "channels": 1, "grid": grid, **SMALL, **settings}
    encoder, decoder = ViTEncoder(**sizes), ViTDecoder(**sizes)
    torch.nn.init.normal_(decoder.last.weight, std=0.1)
    return Tokenizer(encoder, make(VQ, K=16, dim=8), decoder, start)


def attend_slowly(block: ViTBlock, x: Tensor) -> Tensor:
    """Vaswani et al. 2017, section 3.2, one query of one head at a time: x (N, width)."""
    q, k, v = (block.qkv(block.norm1(x))[:, i * 16 : (i + 1) * 16] for i in range(3))
    mixed = torch.zeros_like(x)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        for i in range(len(x)):
            scores = torch.stack([q[i, part] @ k[j, part] for j in range(len(x))]) / 8**0.5
            weights = scores.exp() / scores.exp().sum()
            mixed[i, part] = sum(weights[j] * v[j, part] for j in range(len(x)))
    return x + block.proj(mixed)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_a_block_is_attention_and_two_linear_layers(gated: bool) -> None:
    torch.manual_seed(0)
    block, x = ViTBlock(16, 2, 2, gated, 1), torch.randn(1, 5, 16)
    h = attend_slowly(block, x[0])
    up = block.mlp.up(block.norm2(h))
    if gated:
        n = up.shape[1] // 2
        hidden = up[:, :n] * torch.sigmoid(up[:, :n]) * up[:, n:]
    else:
        hidden = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    torch.testing.assert_close(block(x)[0], h + block.mlp.down(hidden))


def test_both_feed_forward_networks_have_about_as_many_weights() -> None:
    plain, gated = (
        sum(p.numel() for p in FeedForward(96, 4, kind).parameters()) for kind in (False, True)
    )
    assert abs(gated / plain - 1) < 0.02


def test_positions_are_sines_of_the_row_and_of_the_column() -> None:
    positions = sine_positions(3, 4, 8, torch.device("cpu"))
    for row in range(3):
        for column in range(4):
            expected = [
                wave(place / 10_000 ** (i / 2))
                for place in (row, column)
                for wave in (math.sin, math.cos)
                for i in range(2)
            ]
            torch.testing.assert_close(positions[row * 4 + column], torch.tensor(expected))


@pytest.mark.parametrize(
    ("size", "grid", "layout", "patch", "expected"),
    [
        (64, 8, None, None, TokenLayout((8, 8), 8, 0)),
        ((32, 64), (2, 4), None, 16, TokenLayout((2, 4), 16, 0)),
        (64, 1, None, None, TokenLayout((1, 1), 64, 0)),
        (256, (1, 32), None, None, TokenLayout((16, 16), 16, 32)),
        (28, (1, 10), None, None, TokenLayout((14, 14), 2, 10)),
        (64, (1, 32), None, 8, TokenLayout((8, 8), 8, 32)),
        (64, 1, "sequence", None, TokenLayout((16, 16), 4, 1)),
        ((16, 64), (1, 4), "grid", None, TokenLayout((1, 4), 16, 0)),
        ((16, 64), (1, 4), "sequence", 8, TokenLayout((2, 8), 8, 4)),
    ],
)
def test_one_row_is_a_sequence_where_it_is_no_grid_of_the_images(
    size: Any, grid: Any, layout: str | None, patch: int | None, expected: TokenLayout
) -> None:
    assert plan_tokens(size, grid, layout, patch) == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"grid": 3}, r"model.grid=3 times one whole number; use model.grid=4"),
        ({"grid": (4, 8)}, r"image_size=16 is not model.grid=\[4,8\] times one"),
        ({"image_size": (16, 64), "grid": (1, 4)}, r"4 codes without places with model.layout=seq"),
        ({"grid": (4, 2), "layout": "sequence"}, r"of one row; use model.grid=\[1,8\]"),
        ({"layout": "list"}, r"model.layout=list must be null, grid or sequence"),
        (
            {"grid": (1, 5), "layout": "grid"},
            r"is not model.grid=\[1,5\] times .* needs model.layout=seq",
        ),
        ({"patch": 2}, r"model.patch=2 must be f=4, .*; use model.patch=null"),
        (
            {"grid": (1, 5), "image_size": 97},
            r"=97 has no .* model.patch=1 or 97, of which 1 gives 9,409",
        ),
        ({"grid": (1, 5), "patch": 5}, r"model.patch=5 doesn't divide .*=16; use model.patch=4"),
        ({"positions": "none"}, r"model.positions=none must be sine or learned"),
        ({"heads": 3}, r"model.width=16 must be a multiple of 4 and of model.heads=3; use .*=192"),
        ({"depth": 0}, r"model.depth=0 must be a whole number of at least 1 block"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict, sentence: str) -> None:
    sizes = {"image_size": 16, "channels": 3, "grid": 4, **SMALL}
    for kind in (ViTEncoder, ViTDecoder):
        with pytest.raises(InputError, match=sentence):
            kind(**{**sizes, **settings})


def test_a_code_of_a_grid_stands_at_its_patch_and_one_of_a_sequence_nowhere() -> None:
    """With no block between them, codes of a grid reach their own patch alone; those of a sequence none."""
    for grid, reached in (((4, 4), 1), ((1, 5), 0)):
        tokenizer = make_tokenizer(grid)
        h = torch.randn(1, 16, *grid, requires_grad=True)
        decoder = tokenizer.decoder
        whole = torch.autograd.grad(decoder(h)[0, 0, :4, :4].square().sum(), h)[0]
        assert (whole.abs().sum(1) > 0).all(), "attention leads everywhere"
        decoder.layers = decoder.layers[2:]  # type: ignore[index]
        alone = torch.autograd.grad(
            decoder(h)[0, 0, :4, :4].square().sum(), h, allow_unused=True, materialize_grads=True
        )[0]
        assert int((alone.abs().sum(1) > 0).sum()) == reached


@lightning_warnings
@pytest.mark.parametrize(
    ("grid", "start", "settings"),
    [((1, 5), "random", {}), (4, "patches", {"gated": True, "positions": "learned"})],
)
def test_it_trains_across_the_gate(grid: Any, start: str, settings: dict) -> None:
    tokenizer = make_tokenizer(grid, start, channels=3, **settings)
    images = torch.from_numpy(make_noise().samples("train").values)
    tokenizer.initialise(make_noise().augment(images))
    before = {name: value.clone() for name, value in tokenizer.named_parameters()}
    fit(make_module(Gate(start=2, ramp=0, warmup=0), steps=4, tokenizer=tokenizer))
    for name, value in tokenizer.named_parameters():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name


def test_images_become_sequences_and_back() -> None:
    tokenizer, coarse = make_tokenizer(), make_tokenizer(patch=4)
    picture = Image.new("L", (40, 20), 90)
    codes = tokenizer.encode_images([picture, picture])
    assert codes.shape == (2, 1, 5)
    assert tokenizer.code_shape == (1, 5)
    assert [image.size for image in tokenizer.decode_codes(codes)] == [(16, 16)] * 2
    assert tokenizer.decode_codes(codes, "tensor", size=16).shape == (2, 1, 16, 16)  # type: ignore[union-attr]
    for wrong, sentence in (
        (lambda: tokenizer.encode_images(picture, size="own"), "serves images of 16 pixels alone"),
        (lambda: tokenizer.encode_images(picture, size=32), "serves images of 16 pixels alone"),
        (lambda: tokenizer.decode_codes(codes, size=12), "images of 16 pixels; leave size out"),
        (lambda: tokenizer.decode_codes(codes.repeat(1, 1, 2)), "serves 1x5 alone; give that many"),
        (lambda: tokenizer.indices(torch.zeros(1, 1, 32, 32)), "serves 16x16 alone; resize"),
        (lambda: coarse.indices(torch.zeros(1, 1, 35, 33)), "crop or resize them to 16x16"),
        (lambda: tokenizer.f, "5 codes of this tokenizer are a sequence without places"),
    ):
        with pytest.raises(InputError, match=sentence):
            wrong()  # type: ignore[no-untyped-call]


def test_a_sequence_starts_with_random_networks() -> None:
    with pytest.raises(InputError, match=r"of model.grid=\[1,5\] are a .* use model.start=random"):
        make_tokenizer(start="patches")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"grid": [1, 10]}, r"sampler.grid=\[1, 10\] needs codes with places.*; leave it out"),
        ({"init_image": "a.png"}, r"init_image=a.png needs .*; leave it out, with sampler.rows"),
    ],
)
def test_what_needs_places_is_refused_for_a_sequence(settings: dict, sentence: str) -> None:
    sampler = Sampler.unmodified()
    check_places(sampler, make_tokenizer())
    for name, value in settings.items():
        setattr(sampler, name, value)
    check_places(sampler, make_tokenizer(4))
    with pytest.raises(InputError, match=sentence):
        check_places(sampler, make_tokenizer())


def test_a_larger_grid_is_refused_for_a_sequence_before_its_size_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draw, "load_tokenizer", lambda _: (make_tokenizer(), {}))
    sampler = Sampler.unmodified()
    sampler.grid = [1, 3]  # less than the 5 codes: [1, 5] would be refused next
    with pytest.raises(InputError, match="needs codes with places"):
        draw.tokenizer_source("run", sampler, 1, 0, 1, torch.device("cpu"))


def test_classical_vq_is_no_reference_of_a_sequence() -> None:
    data = make_noise()
    data.prepare_data()
    rows, absent = measure_codecs(data, "val", 16, 1, None)
    assert {row["codec"] for row in rows} == {"JPEG"}
    assert absent == {
        "classical VQ": "it has a code for each patch, and the tokenizer's are not of one grid"
    }


@pytest.mark.parametrize(
    ("grid", "positions", "serves"),
    [(4, "sine", True), (4, "learned", False), ((1, 5), "sine", False)],
)
def test_another_size_after_init_is_served_or_refused(
    grid: Any, positions: str, serves: bool
) -> None:
    tokenizer = make_tokenizer(grid, positions=positions)
    model: dict[str, Any] = {"grid": grid, "start": "random"}
    for part in ("encoder", "decoder"):
        model[part] = {"image_size": 16, "channels": 1, "grid": grid}
    wanted = Adoption("runs/vqgan/a", (32, 32), 1, False, (), {})
    described = {"model": model, "quantizer": {}}
    if serves:
        assert adopt_architecture(tokenizer, described, wanted)["model"]["encoder"]["grid"] == 8
        return
    with pytest.raises(InputError, match="the ViTEncoder of .* serves 16 pixels alone; use data"):
        adopt_architecture(tokenizer, described, wanted)


def test_layer_norm_keeps_the_type_of_tokens_on_a_gpu() -> None:
    """Autocast would make it float32, and with it the input of each linear layer; fake tensors stand for a GPU's."""
    torchs, x = torch.nn.LayerNorm(8), torch.randn(2, 3, 8)
    assert torch.equal(LayerNorm(8)(x), torchs(x))
    with FakeTensorMode(), torch.device("cuda"):
        norm, tokens = LayerNorm(8), torch.randn(2, 3, 8, dtype=torch.bfloat16)
        assert norm(tokens).dtype == torch.bfloat16
        assert norm(tokens).device.type == "cuda"
