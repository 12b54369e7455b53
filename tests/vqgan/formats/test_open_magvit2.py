"""Open-MAGVIT2: codes and pictures of its own code, at any size."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.public import (
    PUBLIC,
    assert_parity,
    empty_file,
    import_file,
    published_shapes,
    read_arrays,
    read_plain_weights,
)
from tests.helpers.slow_networks import Draw, convolve, norm_groups, norm_swish
from vqgan.formats import open_magvit2
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.open_magvit2 import OpenMAGVIT2, order_as_pixel_shuffle
from vqgan.networks.open_magvit2 import AdaptiveNorm

FOLDER = PUBLIC / "open_magvit2"
KIND = OpenMAGVIT2()
TARGET = "src.Open_MAGVIT2.models.lfqgan.VQModel"


def read_fixture(averaged: bool = False, **changes: Any) -> PublicFile:
    """The fixture's tokenizer with its last weights, or with their averages, whose names have no dots."""
    state = read_plain_weights(FOLDER / "tiny.ckpt")
    tensors = {key: value for key, value in state.items() if key.startswith(("encoder", "decoder"))}
    if averaged:
        tensors = {key: state[f"model_ema.{key.replace('.', '')}"] for key in tensors}
    described: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / "tiny.yaml"))
    details = {"settings": described["model"]["init_args"], "target": TARGET} | changes
    return PublicFile("tiny.ckpt", tensors, **details)


# The forward pass once more, by names alone.


def run_blocks(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    i = 0
    while f"{name}.{i}.conv1.weight" in w:
        block = f"{name}.{i}"
        h = convolve(w, f"{block}.conv1", norm_swish(w, f"{block}.norm1", x))
        h = convolve(w, f"{block}.conv2", norm_swish(w, f"{block}.norm2", h))
        if f"{block}.nin_shortcut.weight" in w:
            x = convolve(w, f"{block}.nin_shortcut", x)
        x = x + h
        i += 1
    assert i
    return x


def slow_encode(w: Mapping[str, Tensor], x: Tensor, levels: int) -> Tensor:
    h = convolve(w, "encoder.conv_in", x)
    for i in range(levels):
        h = run_blocks(w, f"encoder.down.{i}.block", h)
        if i < levels - 1:
            h = convolve(w, f"encoder.down.{i}.downsample", h, stride=2)
    h = run_blocks(w, "encoder.mid_block", h)
    return convolve(w, "encoder.conv_out", norm_swish(w, "encoder.norm_out", h))


def slow_modulate(w: Mapping[str, Tensor], name: str, h: Tensor, z: Tensor) -> Tensor:
    n = z[0, 0].numel()
    mean = z.sum((2, 3)) / n
    variance = (z - mean[:, :, None, None]).square().sum((2, 3)) / (n - 1)
    scale = F.linear((variance + 1e-6).sqrt(), w[f"{name}.gamma.weight"], w[f"{name}.gamma.bias"])
    shift = F.linear(mean, w[f"{name}.beta.weight"], w[f"{name}.beta.bias"])
    return norm_groups(h) * scale[:, :, None, None] + shift[:, :, None, None]


def slow_decode(w: Mapping[str, Tensor], indices: Tensor, levels: int) -> Tensor:
    bits = w["decoder.conv_in.weight"].shape[1]
    z = torch.stack([(indices >> i & 1) * 2.0 - 1 for i in range(bits)], 1).to(torch.float64)
    h = run_blocks(w, "decoder.mid_block", convolve(w, "decoder.conv_in", z))
    for i in reversed(range(levels)):
        h = slow_modulate(w, f"decoder.adaptive.{i}", h, z)
        h = run_blocks(w, f"decoder.up.{i}.block", h)
        if i:
            wide = convolve(w, f"decoder.up.{i}.upsample.conv1", h)
            n, c, height, width = h.shape
            h = wide.new_zeros(n, c, 2 * height, 2 * width)
            for dy in range(2):
                for dx in range(2):
                    start = (2 * dy + dx) * c
                    h[:, :, dy::2, dx::2] = wide[:, start : start + c]
    return convolve(w, "decoder.conv_out", norm_swish(w, "decoder.norm_out", h))


def draw_weights(
    channels: int, width: int, mults: list[int], depth: int, bits: int
) -> dict[str, Tensor]:
    """Random weights of these sizes, by their public names."""
    draw = Draw()
    draw.add("encoder.conv_in", width, channels, 3, 3, bias=False)
    widths = [width * mult for mult in mults]
    draw.add("decoder.conv_in", widths[-1], bits, 3, 3)
    for i, level_width in enumerate(widths):
        into = [width, *widths][i], [*widths[1:], widths[-1]][i]
        for name, in_width in zip(("encoder.down", "decoder.up"), into, strict=True):
            draw.add_blocks(f"{name}.{i}.block", in_width, level_width, depth, in_width)
        for part in ("gamma", "beta"):
            draw.add(f"decoder.adaptive.{i}.{part}", into[1], bits)
        if i:
            draw.add(f"decoder.up.{i}.upsample.conv1", 4 * level_width, level_width, 3, 3)
        if i < len(mults) - 1:
            draw.add(f"encoder.down.{i}.downsample", level_width, level_width, 3, 3)
    for side, end in (("encoder", widths[-1]), ("decoder", widths[0])):
        draw.add_blocks(f"{side}.mid_block", widths[-1], widths[-1], depth, 0)
        draw.add(f"{side}.norm_out", end)
    draw.add("encoder.conv_out", bits, widths[-1], 1, 1)
    draw.add("decoder.conv_out", channels, widths[0], 3, 3)
    return draw.weights


@pytest.mark.parametrize("averaged", [False, True])
def test_the_fixture_gives_the_codes_and_pictures_of_its_own_code(averaged: bool) -> None:
    reference = read_arrays(FOLDER / "tiny.npz")
    if averaged:
        names = ("z_e", "indices", "reconstruction", "chosen_decoded")
        reference |= {name: reference[f"ema_{name}"] for name in names}
    assert_parity(import_file(KIND, read_fixture(averaged), 32), reference)


def test_weights_alone_are_enough() -> None:
    tokenizer = import_file(KIND, read_fixture(settings={}, target=None), 32)
    assert_parity(tokenizer, read_arrays(FOLDER / "tiny.npz"))


def test_the_order_of_pixel_shuffle_is_caught_if_it_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_magvit2, "order_as_pixel_shuffle", lambda rows: rows)
    tokenizer = import_file(KIND, read_fixture(), 32)
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(tokenizer, read_arrays(FOLDER / "tiny.npz"))


def test_rows_in_another_order_give_the_same_depth_to_space() -> None:
    rows = torch.arange(12.0)  # (dy, dx, channel) with 3 channels
    image = F.pixel_shuffle(order_as_pixel_shuffle(rows).view(1, 12, 1, 1), 2)
    for channel in range(3):
        for dy in range(2):
            for dx in range(2):
                assert image[0, channel, dy, dx] == (2 * dy + dx) * 3 + channel


@pytest.mark.parametrize(
    ("channels", "width", "mults", "depth", "bits"),
    [
        (3, 32, [1, 2], 2, 5),
        (1, 64, [1, 1, 3, 2], 1, 9),
        (4, 32, [2], 3, 1),
        (3, 32, [1, 1, 2, 3, 1], 1, 18),
    ],
)
@torch.no_grad()
def test_other_sizes_equal_a_slow_version(
    channels: int, width: int, mults: list[int], depth: int, bits: int
) -> None:
    torch.manual_seed(0)
    weights, levels = draw_weights(channels, width, mults, depth, bits), len(mults)
    f = 2 ** (levels - 1)
    tokenizer = import_file(KIND, PublicFile("w.bin", weights), 4 * f, channels)
    assert (tokenizer.f, tokenizer.grid) == (f, (4, 4))
    assert (tokenizer.K, tokenizer.dim) == (2**bits, bits)
    weights = {name: value.float().double() for name, value in weights.items()}
    tokenizer.encoder.double()
    tokenizer.decoder.double()
    x = torch.rand(2, channels, 4 * f, 6 * f, dtype=torch.float64) * 2 - 1
    z_e = slow_encode(weights, x, levels)
    torch.testing.assert_close(tokenizer.encode_features(x), z_e, atol=1e-9, rtol=1e-9)
    indices = sum((z_e[:, i] > 0).long() << i for i in range(bits))
    assert torch.equal(tokenizer.indices(x), indices)
    z_q = tokenizer.quantizer.lookup(indices).double()
    slow = slow_decode(weights, indices, levels)
    torch.testing.assert_close(tokenizer.decode(z_q), slow.float())


@pytest.mark.parametrize(
    ("model", "image_size", "grid", "bits"),
    [
        ("open_magvit2/256", 256, 16, 18),
        ("open_magvit2/128", 128, 16, 18),
        ("open_magvit2/pretrain256_16384", 256, 16, 14),
    ],
)
def test_published_models_have_these_names_and_shapes(
    model: str, image_size: int, grid: int, bits: int
) -> None:
    shapes = {
        name: shape
        for name, shape in published_shapes(model).items()
        if not name.startswith("model_ema.")
    }
    with torch.device("meta"):
        tokenizer = import_file(KIND, empty_file(shapes), image_size)
    assert tokenizer.grid == (grid, grid)
    assert 2**bits == tokenizer.K


def test_cosine_codes_are_refused() -> None:
    with pytest.raises(InputError, match="quantizer.cosine=true does not fit tiny.ckpt"):
        KIND.plan(read_fixture(), Choices((32, 32), 3, cosine=True))


def test_one_code_an_image_is_refused() -> None:
    with pytest.raises(InputError, match="model.grid=1 must be at least 2 codes a side"):
        KIND.plan(read_fixture(), Choices((4, 4), 3))


def test_every_code_reaches_every_pixel() -> None:
    norm = AdaptiveNorm(32, 4)
    z_q = torch.randn(1, 4, 3, 3, requires_grad=True)
    h = norm(torch.randn(1, 32, 6, 6), z_q)
    (slope,) = torch.autograd.grad(h[0, :, 0, 0].sum(), z_q)
    assert (slope != 0).all()


def test_an_image_of_one_code_can_not_be_decoded() -> None:
    tokenizer = import_file(KIND, read_fixture(), 32)
    with pytest.raises(InputError, match="use larger images"):
        tokenizer.decode_indices(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_the_config_of_another_model_is_refused() -> None:
    settings = {"n_embed": 128, "embed_dim": 7, "ddconfig": {"ch": 32}}
    with pytest.raises(InputError, match="n_embed=128 where the weights have 64, embed_dim=7"):
        KIND.plan(read_fixture(settings=settings), Choices((32, 32), 3))
    with pytest.raises(InputError, match=r"ch_mult=\[1, 2, 2\] where the weights have \[2, 1, 1\]"):
        KIND.plan(read_fixture(settings={"ddconfig": {"ch_mult": [1, 2, 2]}}), Choices((32, 32), 3))
