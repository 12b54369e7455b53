"""MaskGIT's VQGAN: codes and pictures of its own code, at any size."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
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
from tests.helpers.slow_networks import Draw, convolve, norm_swish
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.maskgit import MaskGITVQGAN
from vqgan.networks.maskgit_vqgan import MaskGITBlock
from vqgan.tokenizer import Tokenizer

FOLDER = PUBLIC / "maskgit_vqgan"
KIND = MaskGITVQGAN()


def read_fixture(**changes: Any) -> PublicFile:
    settings = json.loads((FOLDER / "config.json").read_text())
    tensors = read_plain_weights(FOLDER / "pytorch_model.bin")
    details = {"settings": settings, "target": "MaskGitVQGAN"} | changes
    return PublicFile("pytorch_model.bin", tensors, **details)


# The forward pass once more, by names alone.


def run_blocks(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    i = 0
    while f"{name}.{i}.conv1.weight" in w:
        block = f"{name}.{i}"
        h = convolve(w, f"{block}.conv1", norm_swish(w, f"{block}.norm1", x))
        h = convolve(w, f"{block}.conv2", norm_swish(w, f"{block}.norm2", h))
        if f"{block}.nin_shortcut.weight" in w:
            x = convolve(w, f"{block}.nin_shortcut", h)
        x = x + h
        i += 1
    assert i
    return x


def slow_encode(w: Mapping[str, Tensor], x: Tensor, levels: int) -> Tensor:
    """x in [0, 1] -> z_e."""
    h = convolve(w, "encoder.conv_in", x)
    for i in range(levels):
        h = run_blocks(w, f"encoder.down.{i}.block", h)
        if i < levels - 1:
            n, c, height, width = h.shape
            h = h.view(n, c, height // 2, 2, width // 2, 2).mean((3, 5))
    h = run_blocks(w, "encoder.mid", h)
    return convolve(w, "encoder.conv_out", norm_swish(w, "encoder.norm_out", h))


def slow_decode(w: Mapping[str, Tensor], indices: Tensor, levels: int) -> Tensor:
    """indices (B, h, w) -> x_hat in about [0, 1]."""
    z_q = w["quantize.embedding.weight"][indices].permute(0, 3, 1, 2)
    h = run_blocks(w, "decoder.mid", convolve(w, "decoder.conv_in", z_q))
    for i in reversed(range(levels)):
        h = run_blocks(w, f"decoder.up.{i}.block", h)
        if i:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = convolve(w, f"decoder.up.{i}.upsample_conv", h)
    return convolve(w, "decoder.conv_out", norm_swish(w, "decoder.norm_out", h))


def draw_weights(
    channels: int, width: int, mults: list[int], depth: int, z: int, K: int
) -> dict[str, Tensor]:
    """Random weights of these sizes, by their public names."""
    draw = Draw()
    draw.add("quantize.embedding", K, z, bias=False)
    draw.add("encoder.conv_in", width, channels, 3, 3, bias=False)
    widths = [width * mult for mult in mults]
    draw.add("decoder.conv_in", widths[-1], z, 3, 3)
    for i, level_width in enumerate(widths):
        into = [width, *widths][i], [*widths[1:], widths[-1]][i]
        for name, in_width in zip(("encoder.down", "decoder.up"), into, strict=True):
            draw.add_blocks(f"{name}.{i}.block", in_width, level_width, depth, level_width)
        if i:
            draw.add(f"decoder.up.{i}.upsample_conv", level_width, level_width, 3, 3)
    for side, end in (("encoder", widths[-1]), ("decoder", widths[0])):
        draw.add_blocks(f"{side}.mid", widths[-1], widths[-1], depth, 0)
        draw.add(f"{side}.norm_out", end)
    draw.add("encoder.conv_out", z, widths[-1], 1, 1)
    draw.add("decoder.conv_out", channels, widths[0], 3, 3)
    return draw.weights


def test_the_fixture_gives_the_codes_and_pictures_of_its_own_code() -> None:
    tokenizer = import_file(KIND, read_fixture(), 32)
    assert_parity(tokenizer, read_arrays(FOLDER / "reference.npz"), unit_range=True)


def test_weights_alone_are_enough() -> None:
    tokenizer = import_file(KIND, read_fixture(settings={}, target=None), 32)
    assert_parity(tokenizer, read_arrays(FOLDER / "reference.npz"), unit_range=True)


def assert_mistake_shows(tokenizer: Tokenizer) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(tokenizer, read_arrays(FOLDER / "reference.npz"), unit_range=True)


def test_a_shortcut_that_replaces_the_branch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = import_file(KIND, read_fixture(), 32)
    right = MaskGITBlock.forward

    def drop_branch(self: MaskGITBlock, x: Tensor) -> Tensor:
        y = right(self, x)
        return self.shortcut(y) if self.widths_differ else y

    monkeypatch.setattr(MaskGITBlock, "forward", drop_branch)
    assert_mistake_shows(tokenizer)


def test_every_other_pixel_instead_of_means_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = import_file(KIND, read_fixture(), 32)
    monkeypatch.setattr(torch.nn.AvgPool2d, "forward", lambda _, x: x[:, :, ::2, ::2])
    assert_mistake_shows(tokenizer)


def test_the_wrong_range_is_caught() -> None:
    tokenizer = import_file(KIND, read_fixture(), 32)
    tokenizer.pixels = (-1, 1)
    assert_mistake_shows(tokenizer)


@pytest.mark.parametrize(
    ("channels", "width", "mults", "depth", "z", "K"),
    [
        (3, 32, [1, 2], 2, 5, 7),
        (1, 64, [1, 1, 3, 2], 1, 9, 33),
        (4, 32, [2], 3, 2, 3),
        (3, 32, [1, 1, 2, 3, 1], 1, 16, 20),
    ],
)
@torch.no_grad()
def test_other_sizes_equal_a_slow_version(
    channels: int, width: int, mults: list[int], depth: int, z: int, K: int
) -> None:
    torch.manual_seed(0)
    weights, levels = draw_weights(channels, width, mults, depth, z, K), len(mults)
    f = 2 ** (levels - 1)
    tokenizer = import_file(KIND, PublicFile("w.bin", weights), 4 * f, channels)
    assert (tokenizer.f, tokenizer.grid, tokenizer.K, tokenizer.dim) == (f, (4, 4), K, z)
    weights = {name: value.float().double() for name, value in weights.items()}
    tokenizer.encoder.double()
    tokenizer.decoder.double()
    x = torch.rand(2, channels, 4 * f, 6 * f, dtype=torch.float64) * 2 - 1
    z_e = slow_encode(weights, (x + 1) / 2, levels)
    torch.testing.assert_close(tokenizer.encode_features(x), z_e, atol=1e-9, rtol=1e-9)
    distances = z_e.permute(0, 2, 3, 1)[..., None, :] - weights["quantize.embedding.weight"]
    indices = distances.square().sum(-1).argmin(-1)
    assert torch.equal(tokenizer.indices(x), indices)
    slow = slow_decode(weights, indices, levels) * 2 - 1
    z_q = tokenizer.quantizer.lookup(indices).double()
    torch.testing.assert_close(tokenizer.decode(z_q), slow.float())


def test_the_published_model_has_these_names_and_shapes() -> None:
    file = empty_file(published_shapes("maskgit/maskgit-vqgan-imagenet-f16-256"))
    plan = KIND.plan(file, Choices((256, 256), 3))
    with torch.device("meta"):
        tokenizer = import_file(KIND, file, 256)
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(54.5e6, rel=1e-3)
    assert tokenizer.grid == (16, 16)
    assert plan.model["pixels"] == [0, 1]


def test_the_range_of_the_command_decides() -> None:
    plan = KIND.plan(read_fixture(), Choices((32, 32), 3, pixels=(-1, 1)))
    assert plan.model["pixels"] == [-1, 1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_embeddings": 1024}, "num_embeddings=1024 where the weights have 56"),
        ({"num_res_blocks": 2}, "num_res_blocks=2 where the weights have 1"),
    ],
)
def test_the_config_of_another_model_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        KIND.plan(read_fixture(settings=settings), Choices((32, 32), 3))


def test_cosine_codes_are_refused() -> None:
    with pytest.raises(InputError, match=r"quantizer.cosine=true does not fit pytorch_model.bin"):
        KIND.plan(read_fixture(), Choices((32, 32), 3, cosine=True))


def test_codes_of_another_width_than_the_encoders_are_refused() -> None:
    weights = draw_weights(3, 32, [1, 2], 1, 5, 7)
    weights["quantize.embedding.weight"] = torch.randn(7, 6)
    with pytest.raises(InputError, match="w.bin has codes of 6 numbers and an encoder that gives"):
        KIND.plan(PublicFile("w.bin", weights), Choices((16, 16), 3))


def test_levels_that_are_no_multiples_of_the_first_are_refused() -> None:
    weights = draw_weights(3, 64, [1, 2], 1, 5, 7)
    weights["encoder.conv_in.weight"] = torch.randn(96, 3, 3, 3)
    with pytest.raises(InputError, match="w.bin has levels of 64, 128 channels, and all must be"):
        KIND.plan(PublicFile("w.bin", weights), Choices((16, 16), 3))
