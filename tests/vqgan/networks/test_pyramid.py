"""VQGAN's ResNet with attention at any size, and training from scratch; tests/vqgan/formats holds it against public code."""

import math
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.public import published_shapes
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.load import build_tokenizer
from vqgan.losses.gate import Gate
from vqgan.networks.pyramid import (
    LinearAttention,
    PositionAttention,
    PyramidDecoder,
    PyramidEncoder,
)
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

SMALL = {"image_size": 16, "channels": 3, "grid": 4, "width": 32, "z_channels": 8}


@pytest.mark.parametrize(("size", "grid"), [(16, 16), (16, 8), (32, 4), (64, 2), (48, 12)])
def test_images_become_grids_and_back(size: int, grid: int) -> None:
    parts = {
        **SMALL,
        "image_size": size,
        "grid": grid,
        "mults": None,
        "depth": 1,
        "attention": [grid],
    }
    encoder, decoder = PyramidEncoder(**parts), PyramidDecoder(**parts)
    h = encoder(torch.randn(2, 3, size, size))
    assert h.shape == (2, 8, grid, grid)
    assert decoder(h).shape == (2, 3, size, size)
    assert encoder.f == size // grid


def test_attention_sees_every_position() -> None:
    attention = PositionAttention(32, groups=32)
    x = torch.randn(1, 32, 3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(attention(x)[0, :, 0, 0].sum(), x)
    assert (slope.abs().sum(1) > 0).all()


def test_attention_equals_softmax_over_all_positions_one_by_one() -> None:
    attention, x = PositionAttention(32, groups=32), torch.randn(2, 32, 3, 3)
    h = attention.norm(x)
    q, k, v = (part(h).flatten(2) for part in (attention.q, attention.k, attention.v))
    slow = torch.zeros_like(v)
    for n in range(2):
        for i in range(9):
            weights = torch.softmax(
                torch.stack([q[n, :, i] @ k[n, :, j] for j in range(9)]) / 32**0.5, 0
            )
            slow[n, :, i] = sum(weights[j] * v[n, :, j] for j in range(9))
    torch.testing.assert_close(attention(x), x + attention.out(slow.view(x.shape)))


def test_linear_attention_equals_its_sums_over_positions_one_by_one() -> None:
    attention, x = LinearAttention(4), torch.randn(1, 4, 2, 3)
    q, k, v = attention.qkv(x).flatten(2)[0].split(4)
    shares = [[k[c, n].exp() / k[c].exp().sum() for n in range(6)] for c in range(4)]
    mixed = torch.stack(
        [
            sum(q[c, n] * sum(shares[c][m] * v[:, m] for m in range(6)) for c in range(4))
            for n in range(6)
        ],
        1,
    )
    torch.testing.assert_close(attention(x), attention.out(mixed.view(1, 4, 2, 3)))


OPTIONS = [
    {"middle_attention": False},
    {"attention_kind": "linear"},
    {"resample_conv": False},
    {"groups": 8, "widths": [32, 40, 24], "mults": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_part_of_every_layout_learns(options: dict[str, Any]) -> None:
    parts = {**SMALL, "mults": [1, 2, 1], "depth": 1, "attention": [8], **options}
    encoder, decoder = PyramidEncoder(**parts), PyramidDecoder(**parts, tanh=True)
    torch.nn.init.normal_(decoder.last.weight)  # it starts at zero
    assert len(encoder.places) == len(encoder.layers)
    assert len(decoder.places) == len(decoder.layers)
    x_hat = decoder(encoder(torch.randn(2, 3, 16, 16)))
    assert x_hat.shape == (2, 3, 16, 16)
    assert x_hat.abs().max() <= 1
    x_hat.square().sum().backward()
    resting = [
        name
        for network in (encoder, decoder)
        for name, p in network.named_parameters()
        if p.grad is None
    ]
    assert not resting


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["model.grid=6"],
            "halved several times, as model=pyramid needs; choose one of 64, 32, 16, 8, 4, 2, 1",
        ),
        (["model.grid=128"], "model.grid=128 is not data.image_size=64 halved"),
        (["model.width=48"], "model.width=48 times 1 must be a multiple of 32"),
        (["model.mults=[1,2]"], r"model.mults=\[1, 2\] must have 4 numbers"),
        (["model.mults=[1,1,0,1]"], "model.mults=0 must be a whole number of at least 1"),
        (["model.depth=0"], "model.depth=0 must be a whole number of at least 1"),
        (["+model.encoder.widths=[64,64]"], r"widths=\[64, 64\] must have 4 numbers"),
        (["+model.encoder.widths=[64,80,64,64]"], "80 must be a multiple of 32 channels"),
        (["+model.encoder.groups=0"], "groups=0 must be a whole number of at least 1"),
        (["+model.encoder.attention_kind=flash"], "must be one of softmax, linear"),
        (["model.z_channels=0"], "model.z_channels=0 must be a whole number of at least 1"),
    ],
)
def test_sizes_that_can_not_work_are_refused(words: list[str], sentence: str) -> None:
    config = compose_config("stage=vqgan", "model=pyramid", *words)
    with pytest.raises(InstantiationException, match=sentence):
        build_tokenizer(OmegaConf.to_container(config.model, resolve=True), config.quantizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "K", "dim", "published"),
    [
        ("taming_f16", 1024, 256, "taming/vqgan_imagenet_f16_1024"),
        ("llamagen_f16", 16384, 8, "llamagen/vq_ds16 (VQ-16)"),
    ],
)
def test_presets_have_the_published_number_of_weights(
    option: str, K: int, dim: int, published: str
) -> None:
    config = compose_config(
        "stage=vqgan",
        f"model={option}",
        "data.image_size=256",
        "quantizer=vq",
        f"quantizer.K={K}",
        f"quantizer.dim={dim}",
        "model.start=random",
    )
    with torch.device("meta"):
        tokenizer = build_tokenizer(
            OmegaConf.to_container(config.model, resolve=True), config.quantizer
        )  # type: ignore[arg-type]
    shapes = published_shapes(published)
    numbers = [math.prod(shape) for name, shape in shapes.items() if "codebook_used" not in name]
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(numbers)
    assert tokenizer.grid == (16, 16)


def make_pyramid_tokenizer(start: str) -> Tokenizer:
    parts = {**SMALL, "mults": None, "depth": 1, "attention": [4]}
    return Tokenizer(PyramidEncoder(**parts), make(VQ, 16, 8), PyramidDecoder(**parts), start)


@lightning_warnings
@pytest.mark.parametrize("start", ["patches", "random"])
def test_a_pyramid_trains_as_every_other_network(start: str) -> None:
    torch.manual_seed(0)
    tokenizer, images = (
        make_pyramid_tokenizer(start),
        torch.from_numpy(make_noise().samples("train").values),
    )
    tokenizer.initialise(make_noise().augment(images))
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    module = make_module(Gate(start=2, ramp=0, warmup=0), steps=4, tokenizer=tokenizer)
    fit(module)
    assert module.step == 4
    assert module.discriminator_step > 0
    changed = {
        name
        for name, value in tokenizer.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert {name for name, _ in tokenizer.named_parameters()} - changed == set()


def test_a_pyramid_with_patches_starts_as_classical_vector_quantization() -> None:
    tokenizer = make_pyramid_tokenizer("patches")
    images = make_noise().augment(torch.from_numpy(make_noise().samples("train").values))
    tokenizer.initialise(images)
    assert tokenizer.patches is not None
    q = tokenizer.encode(images)
    torch.testing.assert_close(q.z_e, tokenizer.patches.encode(images))
    torch.testing.assert_close(tokenizer.decode(q.z_q), tokenizer.patches.decode(q.z_q))
