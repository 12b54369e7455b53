"""taming-transformers' VQModel and GumbelVQ, and latent diffusion's VQModel, which has the former's names."""

from collections.abc import Mapping
from typing import Any

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.pyramid_names import (
    CODEBOOK,
    NameStyle,
    SizeReader,
    check_images,
    describe_pyramid,
    name_pyramid,
    require,
)
from vqgan.pyramid import Place

SOFTMAX_PARTS = {"shortcut": "nin_shortcut", "out": "proj_out"}
LINEAR_PARTS = {"shortcut": "nin_shortcut", "out": "to_out", "qkv": "to_qkv"}
CHARACTERISTIC = (
    "encoder.down.0.block.0.conv1.weight",
    "encoder.mid.block_1.conv1.weight",
    "decoder.up.0.block.0.conv1.weight",
    "decoder.norm_out.weight",  # MoVQGAN's has a layer inside
    "quant_conv.weight",
)
# Class labels as colours, and the codes that a prior uses; the tokenizer needs neither.
STATISTICS = frozenset({"colorize", "quantize.used"})


def name_layer(place: Place) -> str:
    """The name of a layer in the code of taming-transformers and all that follow it."""
    ends = {"entry": "conv_in", "norm": "norm_out", "exit": "conv_out"}
    if place.kind in ends:
        return f"{place.side}.{ends[place.kind]}"
    kind = {"block": "block", "attention": "attn"}.get(place.kind)
    if place.is_middle:
        return f"{place.side}.mid.{kind}_{place.number + 1}"
    level = f"{place.side}.{'down' if place.side == 'encoder' else 'up'}.{place.level}"
    if place.kind == "resample":
        return f"{level}.{'downsample' if place.side == 'encoder' else 'upsample'}.conv"
    return f"{level}.{kind}.{place.number}"


def has_taming_names(file: PublicFile) -> bool:
    """Whether a file has the networks of taming-transformers, whatever its quantizer."""
    return file.tensors.keys() >= set(CHARACTERISTIC)


def plan_taming(
    file: PublicFile, choices: Choices, quantizer: Mapping[str, Any], codes: Mapping[str, str]
) -> Plan:
    """The plan of a tokenizer with taming's networks; `codes` are the names of the quantizer's weights."""
    is_linear = any(name.endswith(".to_qkv.weight") for name in file.tensors)
    style = NameStyle(name_layer, LINEAR_PARTS if is_linear else SOFTMAX_PARTS)
    encoder, decoder = SizeReader(file, style).read()
    check_images(
        file, choices, (encoder.channels, decoder.channels), 2 ** (len(encoder.widths) - 1)
    )
    options = {"attention_kind": "linear"} if is_linear else {}
    pixels = choices.pixels or (-1, 1)
    model = describe_pyramid(encoder, decoder, choices.image_size, pixels, **options)
    settings = file.settings.get("ddconfig", {})
    model["decoder"]["tanh"] = bool(settings.get("tanh_out", False))
    names = name_pyramid(model, style) | {f"quantizer.{key}": name for key, name in codes.items()}
    statistics = STATISTICS & file.tensors.keys()
    return Plan(model, dict(quantizer), names, statistics=statistics)


class TamingVQ(Format):
    """A codebook of which the nearest code is chosen."""

    title = "taming-transformers' or latent diffusion's VQModel"

    def recognises(self, file: PublicFile) -> bool:
        return has_taming_names(file) and CODEBOOK in file.tensors

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        K, dim = require(file, CODEBOOK).shape
        quantizer = read_quantizer("vq", K=K, dim=dim, kmeans=False)
        return plan_taming(file, choices, quantizer, {"codebook": CODEBOOK})
