"""diffusers' VQModel: the codes and pictures of its own code, at any sizes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.public import PUBLIC, assert_parity, read_arrays
from tests.helpers.published import check_published
from tests.helpers.slow_vqmodel import (
    SlowVQModel,
    assert_equals_slow,
    draw_weights,
    make_config,
)
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.diffusers import DiffusersVQ
from vqgan.formats.load import load_public
from vqgan.tokenizer import Tokenizer

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

FIXTURES = {
    "diffusers_vq": "diffusion_pytorch_model.safetensors",
    "diffusers_vq_bin": "diffusion_pytorch_model.bin",
    "diffusers_movq": "diffusion_pytorch_model.fp16.safetensors",
    "diffusers_amused": "diffusion_pytorch_model.fp16.safetensors",
}


def read_weights(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return {name: value.float() for name, value in load_file(file).items()}
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights


def read_fixture(folder: str) -> PublicFile:
    settings = json.loads((PUBLIC / folder / "config.json").read_text())
    weights = read_weights(PUBLIC / folder / FIXTURES[folder])
    return PublicFile(folder, weights, settings, settings["_class_name"])


def draw_file(config: dict[str, Any]) -> PublicFile:
    return PublicFile("drawn", draw_weights(config, 0), config, "VQModel")


def import_file(file: PublicFile, image_size: int = 32, **choices: Any) -> Tokenizer:
    channels = file.settings["in_channels"]
    return load_public(file, Choices((image_size, image_size), channels, **choices)).tokenizer


@pytest.mark.parametrize("folder", FIXTURES)
def test_fixtures_have_the_codes_and_pictures_of_their_own_code(folder: str) -> None:
    tokenizer = import_file(read_fixture(folder))
    reference = read_arrays(PUBLIC / folder / "reference.npz")
    assert_parity(tokenizer, reference, unit_range=folder == "diffusers_amused")


SIZES = {
    "one level": make_config([16], norm_num_groups=4),
    "widths that are no multiples": make_config([24, 40, 16], norm_num_groups=8),
    "groups of one channel": make_config([12, 24], norm_num_groups=12, layers_per_block=2),
    "attention in the encoder alone": make_config(
        [16, 32], norm_num_groups=16, down_block_types=[f"Attn{DOWN}", DOWN], vq_embed_dim=5
    ),
    "attention in the decoder alone": make_config(
        [16, 32, 32], norm_num_groups=2, up_block_types=[UP, f"Attn{UP}", f"Attn{UP}"]
    ),
    "attention everywhere, three blocks": make_config(
        [32, 64],
        layers_per_block=3,
        down_block_types=[f"Attn{DOWN}"] * 2,
        up_block_types=[f"Attn{UP}"] * 2,
        latent_channels=9,
        num_vq_embeddings=50,
    ),
    "no attention in the middle": make_config(
        [8, 16],
        norm_num_groups=1,
        mid_block_add_attention=False,
        down_block_types=[DOWN, f"Attn{DOWN}"],
    ),
    "grey images": make_config([16, 16], norm_num_groups=8, in_channels=1, out_channels=1),
    "spatial, other groups in the encoder": make_config(
        [32, 64], norm_num_groups=8, norm_type="spatial", latent_channels=5
    ),
    "spatial, attention in all levels": make_config(
        [32, 96, 64],
        norm_type="spatial",
        layers_per_block=2,
        down_block_types=[f"Attn{DOWN}"] * 3,
        up_block_types=[f"Attn{UP}"] * 3,
    ),
    "spatial, no attention": make_config(
        [64, 32], norm_type="spatial", mid_block_add_attention=False
    ),
}


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_other_sizes_equal_the_forward_pass_written_out(sizes: str) -> None:
    config = SIZES[sizes]
    file = draw_file(config)
    x = torch.rand(2, config["in_channels"], 24, 24, dtype=torch.float64) * 2 - 1
    assert_equals_slow(import_file(file, 24), SlowVQModel(file.tensors, config), x)


@torch.no_grad()
def test_a_planted_mistake_in_the_order_of_levels_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config([16, 16, 16], norm_num_groups=8)
    file = draw_file(config)
    swapped = dict(file.tensors)
    for name in file.tensors:
        if "up_blocks.0.resnets" in name:
            other = name.replace("up_blocks.0", "up_blocks.1")
            swapped[name], swapped[other] = file.tensors[other], file.tensors[name]
    tokenizer = import_file(replace(file, tensors=swapped))
    indices = torch.arange(16).view(1, 4, 4)
    decoded = SlowVQModel(file.tensors, config).decode(indices)
    assert (tokenizer.decode_indices(indices) - decoded).abs().max() > 1e-3


@torch.no_grad()
def test_images_of_other_sides_work() -> None:
    config = make_config([16, 32], norm_num_groups=8, norm_type="group")
    file = draw_file(config)
    tokenizer, slow = import_file(file), SlowVQModel(file.tensors, config)
    assert_equals_slow(tokenizer, slow, torch.rand(1, 3, 10, 26, dtype=torch.float64) * 2 - 1)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (
            "diffusers/kandinsky movq",
            make_config(
                [128, 256, 256, 512],
                norm_type="spatial",
                layers_per_block=2,
                latent_channels=4,
                down_block_types=[DOWN, DOWN, DOWN, f"Attn{DOWN}"],
                up_block_types=[f"Attn{UP}", UP, UP, UP],
                num_vq_embeddings=16384,
                vq_embed_dim=4,
            ),
        ),
        (
            "diffusers/amused vqvae",
            make_config(
                [128, 256, 256, 512, 768],
                layers_per_block=2,
                latent_channels=64,
                num_vq_embeddings=8192,
                mid_block_add_attention=False,
                lookup_from_codebook=True,
            ),
        ),
        (
            "diffusers/vq-diffusion-ithq vqvae",
            make_config(
                [64, 128, 256, 512],
                layers_per_block=2,
                latent_channels=256,
                vq_embed_dim=128,
                num_vq_embeddings=4096,
                down_block_types=[DOWN, DOWN, DOWN, f"Attn{DOWN}"],
                up_block_types=[f"Attn{UP}", UP, UP, UP],
            ),
        ),
        (
            "diffusers/ldm f4 (CompVis vq-f4)",
            make_config([128, 256, 512], layers_per_block=2, num_vq_embeddings=8192),
        ),
    ],
)
def test_published_models_have_a_place_for_every_weight(model: str, config: dict[str, Any]) -> None:
    check_published(DiffusersVQ(), model, config, "VQModel")


@torch.no_grad()
def test_old_names_of_attention_give_the_same_pictures() -> None:
    config = make_config([16, 16], norm_num_groups=8, up_block_types=[f"Attn{UP}", UP])
    file = draw_file(config)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in file.tensors.items():
        for new, word in old.items():
            name = name.replace(f".{new}.", f".{word}.")
        renamed[name] = value
    assert renamed.keys() != file.tensors.keys()
    x = torch.rand(1, 3, 16, 16)
    first, second = import_file(file, 16), import_file(replace(file, tensors=renamed), 16)
    assert torch.equal(first.decode(first.encode(x).z_q), second.decode(second.encode(x).z_q))


@torch.no_grad()
def test_half_precision_becomes_float32() -> None:
    config = make_config([16, 16], norm_num_groups=8)
    file = draw_file(config)
    half = {name: value.half() for name, value in file.tensors.items()}
    tokenizer = import_file(replace(file, tensors=half))
    assert {value.dtype for value in tokenizer.parameters()} == {torch.float32}


def plan_with(**changes: Any) -> Any:
    """The plan of a small file whose config differs in these settings from its weights'."""
    config = make_config([16, 32], norm_num_groups=8)
    file = draw_file(config)
    return DiffusersVQ().plan(replace(file, settings={**config, **changes}), Choices((32, 32), 3))


@pytest.mark.parametrize(
    ("changes", "setting", "size"),
    [
        ({"num_vq_embeddings": 25}, "num_vq_embeddings=25", "24"),
        ({"vq_embed_dim": 4}, "vq_embed_dim=4", "3"),
        ({"latent_channels": 4}, "latent_channels=4", "3"),
        ({"layers_per_block": 2}, "layers_per_block=2", "1"),
        ({"block_out_channels": [16, 16]}, r"block_out_channels=\[16, 16\]", r"\[16, 32\]"),
        ({"norm_type": "spatial"}, "norm_type=spatial", "group"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False", "True"),
        (
            {"up_block_types": [f"Attn{UP}", UP]},
            "up_block_types",
            r"\['UpDecoderBlock2D', 'UpDecoderBlock2D'\]",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(
    changes: dict[str, Any], setting: str, size: str
) -> None:
    with pytest.raises(InputError, match=rf"{setting}.* where the weights have {size}"):
        plan_with(**changes)


def test_a_config_may_leave_out_what_has_a_default() -> None:
    config = make_config([32, 64])
    file = draw_file(config)
    short = {key: config[key] for key in ("_class_name", "block_out_channels", "down_block_types")}
    plan = DiffusersVQ().plan(replace(file, settings=short), Choices((32, 32), 3))
    assert plan == DiffusersVQ().plan(file, Choices((32, 32), 3))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"act_fn": "mish"}, "act_fn=mish must be silu"),
        ({"norm_num_groups": "many"}, "norm_num_groups=many must be a whole number of at least 1"),
        ({"norm_num_groups": 12}, "must be a multiple of 12 channels"),
    ],
)
def test_a_config_that_can_not_be_built_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plan_with(**changes)


def test_weights_without_a_config_are_refused() -> None:
    file = replace(draw_file(make_config([32, 64])), settings={}, target=None)
    with pytest.raises(InputError, match=r"needs its config.json: the groups .* config=<file>"):
        DiffusersVQ().plan(file, Choices((32, 32), 3))


def test_codes_are_compared_as_they_are() -> None:
    file = draw_file(make_config([32]))
    with pytest.raises(InputError, match="quantizer.cosine=true does not fit drawn"):
        DiffusersVQ().plan(file, Choices((32, 32), 3, cosine=True))


@pytest.mark.parametrize(
    ("lookup", "pixels", "expected", "remark"),
    [
        (False, None, [-1, 1], "pixels=[0,1] is the other reading"),
        (True, None, [0, 1], "pixels=[-1,1] is the other reading"),
        (True, (-1, 1), [-1, 1], None),
        (False, (0, 1), [0, 1], None),
    ],
)
def test_the_range_of_images_is_a_setting_and_what_is_assumed_is_said(
    lookup: bool, pixels: tuple[int, int] | None, expected: list[int], remark: str | None
) -> None:
    file = draw_file(make_config([32], lookup_from_codebook=lookup))
    plan = DiffusersVQ().plan(file, Choices((32, 32), 3, pixels))
    assert plan.model["pixels"] == expected
    assert len(plan.remarks) == (remark is not None)
    assert remark is None or remark in plan.remarks[0]


@torch.no_grad()
def test_images_in_0_1_are_outside_in_minus_1_1() -> None:
    config = make_config([16], norm_num_groups=8)
    file = draw_file(config)
    tokenizer, slow = import_file(file, 8, pixels=(0, 1)), SlowVQModel(file.tensors, config)
    assert_equals_slow(tokenizer, slow, torch.rand(1, 3, 8, 8, dtype=torch.float64))
