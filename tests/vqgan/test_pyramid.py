"""VQGAN's ResNet with attention: the same codes and pictures as the public code's, at any size, and training from scratch."""

import math
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from torch import Tensor

from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.public_files import published_names
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.load import build_tokenizer
from vqgan.losses.gate import Gate
from vqgan.pyramid import (
    Double,
    Halve,
    PositionAttention,
    PyramidBlock,
    PyramidDecoder,
    PyramidEncoder,
)
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

PUBLIC = Path(__file__).parents[1] / "fixtures" / "public"
SMALL = {"image_size": 16, "channels": 3, "grid": 4, "width": 32, "z_channels": 8}


class Inert:
    """Stands for a class that an old checkpoint names."""


def read_state(file: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint whose other entries name a class of an old Lightning."""
    name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    with torch.serialization.safe_globals([(Inert, name)]):
        state: dict[str, Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if not key.startswith("loss.")}


def public_names(network: torch.nn.Module, side: str, levels: int) -> Iterator[str]:
    """The public name of each layer of a network, in the order of its layers."""
    level = 0 if side == "encoder" else levels - 1
    part, block, attn = "", count(), count()
    yield "conv_in"
    middle = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    layers = list(network.layers)[1:]  # type: ignore[arg-type]
    if side == "decoder":
        yield from middle
        layers = layers[3:]
    else:
        layers = layers[:-6]
    for layer in layers:
        part = f"{'down' if side == 'encoder' else 'up'}.{level}"
        if isinstance(layer, PyramidBlock):
            yield f"{part}.block.{next(block)}"
        elif isinstance(layer, PositionAttention):
            yield f"{part}.attn.{next(attn)}"
        elif isinstance(layer, Halve | Double):
            yield f"{part}.{'downsample' if side == 'encoder' else 'upsample'}.conv"
            level, block, attn = level + (1 if side == "encoder" else -1), count(), count()
    if side == "encoder":
        yield from middle
    yield "norm_out"
    yield ""  # SiLU
    if side == "encoder":
        yield "conv_out"


def load_public(tokenizer: Tokenizer, state: Mapping[str, Tensor], levels: int) -> None:
    """Put public weights in their places; each is taken exactly once."""
    ours = {"shortcut": "nin_shortcut", "out": "proj_out"}
    renamed = {"into": "quant_conv", "out": "post_quant_conv", "decoder.last": "decoder.conv_out"}
    for side in ("encoder", "decoder"):
        network = getattr(tokenizer, side)
        for i, (layer, name) in enumerate(
            zip(network.layers, public_names(network, side, levels), strict=True)
        ):
            for inner in {key.rpartition(".")[0] for key in layer.state_dict()}:
                public = ".".join(filter(None, [side, name, ours.get(inner, inner)]))
                renamed[".".join(filter(None, [side, "layers", str(i), inner]))] = public
    names = {
        key: "quantize.embedding.weight"
        if key == "quantizer.codebook"
        else f"{renamed[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}"
        for key, _ in tokenizer.named_parameters()
    }
    assert sorted(names.values()) == sorted(state)
    current = tokenizer.state_dict()
    tokenizer.load_state_dict({**current, **{key: state[name] for key, name in names.items()}})


def open_public(folder: str, name: str) -> tuple[Tokenizer, dict[str, Tensor]]:
    """A public tokenizer of tests/fixtures/public and the arrays that its own code made."""
    described: Any = OmegaConf.load(PUBLIC / folder / f"{name}.yaml")
    params = described.model.params
    sizes = params.ddconfig
    levels = len(sizes.ch_mult)
    parts = {
        "image_size": sizes.resolution,
        "channels": sizes.in_channels,
        "grid": sizes.resolution >> (levels - 1),
        "width": sizes.ch,
        "mults": list(sizes.ch_mult),
        "depth": sizes.num_res_blocks,
        "attention": list(sizes.attn_resolutions),
        "z_channels": sizes.z_channels,
    }
    quantizer = make(VQ, params.n_embed, params.embed_dim)
    tokenizer = Tokenizer(PyramidEncoder(**parts), quantizer, PyramidDecoder(**parts), "random")
    load_public(tokenizer, read_state(PUBLIC / folder / f"{name}.ckpt"), levels)
    arrays = np.load(PUBLIC / folder / f"{name}.npz")
    return tokenizer.eval(), {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize(("folder", "name"), [("taming_vq", "last"), ("ldm_vq", "f8")])
@torch.no_grad()
def test_public_weights_give_the_codes_and_pictures_of_their_own_code(
    folder: str, name: str
) -> None:
    tokenizer, reference = open_public(folder, name)
    q = tokenizer.encode(reference["images"])
    torch.testing.assert_close(q.z_e, reference["z_e"], atol=1e-5, rtol=0)
    assert torch.equal(q.indices, reference["indices"])
    decoded = tokenizer.decode_indices(q.indices)
    torch.testing.assert_close(decoded, reference["reconstruction"], atol=1e-5, rtol=0)
    chosen = tokenizer.decode_indices(reference["chosen_indices"])
    torch.testing.assert_close(chosen, reference["chosen_decoded"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_planted_mistake_in_the_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, reference = open_public("taming_vq", "last")
    monkeypatch.setattr(
        Halve,
        "forward",
        lambda self, x: torch.nn.functional.conv2d(x, self.weight, self.bias, 2, 1),
    )
    z_e = tokenizer.encode(reference["images"]).z_e
    assert (z_e - reference["z_e"]).abs().max() > 1e-3


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
    shapes = published_names()[published]
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
