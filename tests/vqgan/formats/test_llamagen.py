"""LlamaGen's tokenizers: codes by their direction, names by the order of running, sizes without a config."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.published import check_published
from tests.helpers.slow_vqmodel import SlowVQModel, assert_equals_slow, draw_weights, make_config
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.llamagen import LlamaGen
from vqgan.formats.load import load_public

CODEBOOK = "quantize.embedding.weight"
RENAMED = {
    "mid_block.resnets.0": "mid.0",
    "mid_block.attentions.0": "mid.1",
    "mid_block.resnets.1": "mid.2",
    "down_blocks": "conv_blocks",
    "up_blocks": "conv_blocks",
    "resnets": "res",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
SIZES = {
    "one block": make_config(
        [32, 64],
        latent_channels=7,
        vq_embed_dim=4,
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    ),
    "three levels": make_config(
        [64, 64, 32],
        layers_per_block=2,
        latent_channels=6,
        down_block_types=["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
        num_vq_embeddings=40,
    ),
}


class SlowCosine(SlowVQModel):
    """Outputs and codes are scaled to length 1 before they are compared, and the scaled code is decoded."""

    def choose(self, z_e: Tensor) -> Tensor:
        codes = F.normalize(self.weights[CODEBOOK], dim=1)
        scores = torch.einsum("bchw,kc->bhwk", F.normalize(z_e, dim=1), codes)
        return scores.argmax(-1)

    def decode(self, indices: Tensor) -> Tensor:
        scaled = {**self.weights, CODEBOOK: F.normalize(self.weights[CODEBOOK], dim=1)}
        return SlowVQModel(scaled, self.config).decode(indices)


def draw_file(config: dict[str, Any], **settings: Any) -> tuple[PublicFile, dict[str, Tensor]]:
    """A file of LlamaGen and the same weights by diffusers' names."""
    weights = draw_weights(config, 0)
    lengths = torch.rand(len(weights[CODEBOOK]), 1, generator=torch.Generator().manual_seed(1))
    weights[CODEBOOK] = weights[CODEBOOK] * (0.2 + 3 * lengths)
    tensors = {"quantize.codebook_used": torch.zeros(65536)}
    for name, value in weights.items():
        is_matrix = ".to_" in name and value.ndim == 2
        for theirs, word in RENAMED.items():
            name = name.replace(theirs, word)
        tensors[name] = value[:, :, None, None] if is_matrix else value
    return PublicFile("drawn", tensors, settings), weights


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_other_sizes_equal_the_forward_pass_written_out(sizes: str, cosine: bool) -> None:
    config = SIZES[sizes]
    file, weights = draw_file(config, codebook_l2_norm=cosine)
    tokenizer = load_public(file, Choices((24, 24), 3)).tokenizer
    slow = (SlowCosine if cosine else SlowVQModel)(weights, config)
    x = torch.rand(2, 3, 24, 24, dtype=torch.float64) * 2 - 1
    assert_equals_slow(tokenizer, slow, x)


@torch.no_grad()
def test_codes_that_are_not_scaled_are_a_mistake_that_shows() -> None:
    config = SIZES["one block"]
    file, weights = draw_file(config, codebook_l2_norm=False)
    tokenizer = load_public(file, Choices((24, 24), 3)).tokenizer
    slow = SlowCosine(weights, config)
    x = torch.rand(1, 3, 24, 24) * 2 - 1
    assert not torch.equal(tokenizer.indices(x), slow.choose(slow.encode(x)))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llamagen/vq_ds16 (VQ-16)", {}),
        ("llamagen/vq_ds8 (VQ-8)", {}),
        (
            "llamagen/vq_ds16 (VQ-16)",
            {
                "codebook_size": 16384,
                "codebook_embed_dim": 8,
                "codebook_l2_norm": True,
                "encoder_ch_mult": [1, 1, 2, 2, 4],
                "decoder_ch_mult": [1, 1, 2, 2, 4],
                "z_channels": 256,
            },
        ),
    ],
)
def test_published_models_have_a_place_for_every_weight(
    model: str, settings: dict[str, Any]
) -> None:
    check_published(LlamaGen(), model, settings, "")


def test_the_statistic_of_used_codes_may_be_absent() -> None:
    file, _ = draw_file(SIZES["one block"])
    tensors = {name: v for name, v in file.tensors.items() if name != "quantize.codebook_used"}
    assert LlamaGen().plan(file, Choices((32, 32), 3)).statistics == {"quantize.codebook_used"}
    assert not LlamaGen().plan(replace(file, tensors=tensors), Choices((32, 32), 3)).statistics


@pytest.mark.parametrize(
    ("own", "cosine", "expected", "is_assumed"),
    [
        (None, None, True, True),
        (None, True, True, False),
        (None, False, False, False),
        (True, None, True, False),
        (False, None, False, False),
        (True, True, True, False),
    ],
)
def test_cosine_codes_come_from_config_or_command_and_an_assumption_is_said(
    own: bool | None, cosine: bool | None, expected: bool, is_assumed: bool
) -> None:
    file, _ = draw_file(SIZES["one block"], **({} if own is None else {"codebook_l2_norm": own}))
    plan = LlamaGen().plan(file, Choices((32, 32), 3, cosine=cosine))
    assert plan.quantizer["cosine"] is expected
    assert len(plan.remarks) == is_assumed


def test_a_command_that_contradicts_the_config_is_refused() -> None:
    file, _ = draw_file(SIZES["one block"], codebook_l2_norm=True)
    with pytest.raises(InputError, match=r"quantizer\.cosine=false contradicts codebook_l2_norm"):
        LlamaGen().plan(file, Choices((32, 32), 3, cosine=False))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"codebook_size": 16384}, "codebook_size=16384 where the weights have 24"),
        (
            {"encoder_ch_mult": [1, 1, 2, 2, 4]},
            r"encoder_ch_mult=\[1, 1, 2, 2, 4\] where the weights have \[1, 2\]",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(settings: dict[str, Any], sentence: str) -> None:
    file, _ = draw_file(SIZES["one block"], **settings)
    with pytest.raises(InputError, match=sentence):
        LlamaGen().plan(file, Choices((32, 32), 3))
