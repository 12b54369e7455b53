"""MoVQGAN: taming's names around a decoder that the codes modulate."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.published import check_published
from tests.helpers.slow_vqmodel import SlowVQModel, assert_equals_slow, draw_weights, make_config
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.load import choose_format, load_public
from vqgan.formats.movqgan import MoVQGAN

ATTENTION = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
RENAMED = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "spatial_norm": "norm",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
SIZES = {
    "small": make_config([32, 64], norm_type="spatial", latent_channels=4),
    "deep, with codes of another width": make_config(
        [32, 32, 96],
        norm_type="spatial",
        layers_per_block=2,
        latent_channels=6,
        vq_embed_dim=5,
        down_block_types=["DownEncoderBlock2D", *ATTENTION],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    ),
}


def rename(name: str, levels: int) -> str:
    """MoVQGAN's name of a weight of diffusers' VQModel."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    for theirs, word in RENAMED.items():
        name = name.replace(theirs, word)
    return name


def draw_file(config: dict[str, Any]) -> tuple[PublicFile, dict[str, Tensor]]:
    """A file of MoVQGAN and the same weights by diffusers' names."""
    weights = draw_weights(config, 0)
    widths = config["block_out_channels"]
    tensors = {}
    for name, value in weights.items():
        is_matrix = ".to_" in name and value.ndim == 2
        tensors[rename(name, len(widths))] = value[:, :, None, None] if is_matrix else value
    settings = {
        "n_embed": config["num_vq_embeddings"],
        "embed_dim": config["vq_embed_dim"] or config["latent_channels"],
        "ddconfig": {
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config["layers_per_block"],
            "z_channels": config["latent_channels"],
        },
    }
    return PublicFile("drawn", tensors, settings, "movqgan.models.vqgan.MOVQ"), weights


@pytest.mark.parametrize("sizes", SIZES)
def test_other_sizes_equal_the_forward_pass_written_out(sizes: str) -> None:
    config = SIZES[sizes]
    file, weights = draw_file(config)
    tokenizer = load_public(file, Choices((24, 24), 3)).tokenizer
    x = torch.rand(2, 3, 24, 24, dtype=torch.float64) * 2 - 1
    assert_equals_slow(tokenizer, SlowVQModel(weights, config), x)


def test_a_file_without_a_config_needs_none() -> None:
    file, _ = draw_file(SIZES["small"])
    bare = replace(file, settings={}, target=None)
    assert isinstance(choose_format(bare), MoVQGAN)
    assert MoVQGAN().plan(bare, Choices((32, 32), 3)) == MoVQGAN().plan(file, Choices((32, 32), 3))


@pytest.mark.parametrize("model", ["67M", "102M", "270M"])
def test_published_models_have_a_place_for_every_weight(model: str) -> None:
    sizes = {"ch": 256 if model == "270M" else 128, "num_res_blocks": 4 if model == "102M" else 2}
    settings = {
        "n_embed": 16384,
        "embed_dim": 4,
        "ddconfig": {**sizes, "ch_mult": [1, 2, 2, 4], "z_channels": 4, "in_channels": 3},
    }
    check_published(MoVQGAN(), f"movqgan/{model}", settings, "movqgan.models.vqgan.MOVQ")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_embed": 99}, "n_embed=99 where the weights have 24"),
        ({"ddconfig": {"num_res_blocks": 3}}, "num_res_blocks=3 where the weights have 1"),
        ({"ddconfig": {"ch_mult": [1, 1]}}, r"ch_mult=\[1, 1\] where the weights have \[1, 2\]"),
    ],
)
def test_a_config_of_another_model_is_refused(settings: dict[str, Any], sentence: str) -> None:
    file, _ = draw_file(SIZES["small"])
    with pytest.raises(InputError, match=sentence):
        MoVQGAN().plan(replace(file, settings=settings), Choices((32, 32), 3))


def test_a_convolution_of_the_codes_is_refused() -> None:
    file, _ = draw_file(SIZES["small"])
    tensors = {**file.tensors, "decoder.norm_out.conv.weight": torch.zeros(4, 4, 3, 3)}
    with pytest.raises(InputError, match=r"add_conv.*not built"):
        MoVQGAN().plan(replace(file, tensors=tensors), Choices((32, 32), 3))


def test_widths_that_32_does_not_divide_are_refused() -> None:
    config = make_config([32, 64], norm_type="spatial")
    file, _ = draw_file(config)
    tensors = dict(file.tensors)
    for name, value in tensors.items():  # what a model of 48 channels would have
        tensors[name] = value.repeat(2, *[1] * (value.ndim - 1))[:48] if len(value) == 32 else value
    with pytest.raises(InputError, match="48 must be a multiple of 32 channels|=48 times"):
        MoVQGAN().plan(replace(file, tensors=tensors, settings={}), Choices((32, 32), 3))
