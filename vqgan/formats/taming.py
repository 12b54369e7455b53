"""taming-transformers' and latent diffusion's VQModel, which have the same names, and what else is built of their networks."""

from collections.abc import Mapping
from typing import Any

from codegrid.engine.errors import InputError
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config, read_section
from vqgan.formats.pyramid_names import (
    CODEBOOK,
    NameStyle,
    SideSizes,
    SizeReader,
    check_images,
    describe_pyramid,
    name_pyramid,
    require,
)
from vqgan.networks.pyramid import Place

SOFTMAX_PARTS = {"shortcut": "nin_shortcut", "out": "proj_out"}
LINEAR_PARTS = {"shortcut": "nin_shortcut", "out": "to_out", "qkv": "to_qkv"}
CHARACTERISTIC = frozenset(
    {
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.block_1.conv1.weight",
        "decoder.up.0.block.0.conv1.weight",
        "decoder.norm_out.weight",  # MoVQGAN's norm has a layer inside
        "quant_conv.weight",
    }
)
JOINT_ATTENTION = "encoder.mid.attn_1.qkv.weight"  # VAR's, whose other networks have the same names
LABEL_COLOURS = "colorize"  # of the classes of label maps, to show them
USED_CODES = "quantize.used"  # the codes that a prior was trained on
TAMING_WORDS = {
    "in_channels": "channels",
    "ch": "width",
    "ch_mult": "mults",
    "num_res_blocks": "blocks",
    "z_channels": "z_channels",
}
VQ_CLASSES = ("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel")


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
    names = file.tensors.keys()
    return names >= CHARACTERISTIC and JOINT_ATTENTION not in names


def is_muse(file: PublicFile) -> bool:
    """Whether a file's config is of open-muse, whose networks have taming's names and differ."""
    return (file.target or "").endswith("VQGANModel") or "hidden_channels" in file.settings


def read_code_score(file: PublicFile) -> str | None:
    """Which code a model of taming's names and one codebook chooses, nearest or inner_product; None if its file doesn't say."""
    target = file.target or ""
    if "ibq" in target.lower():
        return "inner_product"
    if target.rpartition(".")[2] in VQ_CLASSES:
        return "nearest"
    # IBQ averages its codes; taming averages nothing.
    return "inner_product" if not target and CODEBOOK in file.averaged else None


def choose_code_score(file: PublicFile, choices: Choices) -> str:
    """Which code a model of taming's names and one codebook chooses. Raises InputError if that is open, or contradicted."""
    score = read_code_score(file)
    if score is None and choices.score is None:
        reason = "no config says which it is"
        if file.target:
            reason = f"the class in its config, {file.target}, is neither"
        elif file.settings:
            reason = "its config names no class"
        raise InputError(
            f"{file.source} has the names of VQModel, which chooses the nearest code, and of IBQ, which chooses the one with the "
            f"largest inner product, and {reason}; name its config with config=<file>, or set quantizer.score=nearest or "
            "quantizer.score=inner_product"
        )
    if score and choices.score and score != choices.score:
        says = f"its config says {file.target}" if file.target else "its codes are averaged"
        raise InputError(
            f"quantizer.score={choices.score} does not fit {file.source}: {says}, which chooses by {score}; "
            "leave quantizer.score out"
        )
    return score or choices.score or ""


def check_latents(file: PublicFile, encoder: SideSizes) -> None:
    """Raise InputError if the convolution before the codes does not take what the encoder gives."""
    width = require(file, "quant_conv.weight", dims=4).shape[1]
    if width != encoder.z_channels:
        reason = "double_z=true gives means and variances, which a codebook has no use for"
        raise InputError(
            f"the encoder of {file.source} gives {encoder.z_channels} channels and its quant_conv takes {width}, so its own "
            f"code can't run it either{f' ({reason})' if encoder.z_channels == 2 * width else ''}"
        )


def plan_taming(
    file: PublicFile,
    choices: Choices,
    config: Mapping[str, Any],
    quantizer: Mapping[str, Any],
    codes: Mapping[str, str],
) -> Plan:
    """The plan of a tokenizer with taming's networks.

    `config` is what its own config says of them, `codes` are the quantizer's weights and their public names.
    """
    refuse_cosine(file, choices)
    encoder, decoder, options = read_taming(file, choices)
    check_config(file, file.settings, {"n_embed": quantizer["K"], "embed_dim": quantizer["dim"]})
    check_config(file, config, encoder.in_words(TAMING_WORDS))
    pixels = choices.pixels or (-1, 1)
    model = describe_pyramid(encoder, decoder, choices.image_size, pixels, **options)
    model["decoder"]["tanh"] = config.get("tanh_out") is True
    names = name_taming(model) | {f"quantizer.{key}": name for key, name in codes.items()}
    remarks = []
    if USED_CODES in file.tensors:
        used = file.tensors[USED_CODES].numel()
        remarks.append(
            f"its priors count {used:,} of its {quantizer['K']:,} codes, by their place in {USED_CODES}; "
            "here every code has its own index"
        )
    if not file.settings:
        remarks.append("it has no config, so its images end without tanh, as published models do")
        if choices.pixels is None:
            remarks.append(
                "pixels=[-1,1], as its program has it; open-muse's VQGANModel has the same names and pixels=[0,1]"
            )
    statistics = frozenset({LABEL_COLOURS, USED_CODES}) & file.tensors.keys()
    return Plan(model, dict(quantizer), names, {}, statistics, tuple(remarks))


def read_taming(file: PublicFile, choices: Choices) -> tuple[SideSizes, SideSizes, dict[str, Any]]:
    """The sizes of both networks, and the settings that both share beside them.

    Raises InputError for weights that don't fit each other or the images.
    """
    is_linear = any(name.endswith(".to_qkv.weight") for name in file.tensors)
    encoder, decoder = SizeReader(file, NameStyle(name_layer, {})).read()
    check_latents(file, encoder)
    check_images(file, choices, (encoder.channels, decoder.channels), encoder.f)
    return encoder, decoder, {"attention_kind": "linear"} if is_linear else {}


def name_taming(model: Mapping[str, Any]) -> dict[str, str]:
    """The public names of the networks of a `model` group."""
    is_linear = model["encoder"].get("attention_kind") == "linear"
    return name_pyramid(model, NameStyle(name_layer, LINEAR_PARTS if is_linear else SOFTMAX_PARTS))


def read_networks(file: PublicFile) -> Mapping[str, Any]:
    """What taming's configs say of both networks."""
    return read_section(file.settings, "ddconfig")


def refuse_cosine(file: PublicFile, choices: Choices) -> None:
    """Raise InputError if the command wants codes of length 1, which no format of these networks has."""
    if choices.cosine:
        raise InputError(
            f"quantizer.cosine=true does not fit {file.source}, whose codes are compared as they are; leave it out"
        )


class TamingVQ(Format):
    """A codebook of which the nearest code is chosen."""

    title = "taming-transformers' or latent diffusion's VQModel"

    def recognises(self, file: PublicFile) -> bool:
        has_codes = has_taming_names(file) and CODEBOOK in file.tensors
        return has_codes and read_code_score(file) != "inner_product" and not is_muse(file)

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        K, dim = require(file, CODEBOOK).shape
        score = choose_code_score(file, choices)
        if score == "inner_product":
            quantizer = {**read_quantizer("ibq", K=K, dim=dim, kmeans=False), "score": score}
        else:
            quantizer = read_quantizer("vq", K=K, dim=dim, kmeans=False)
        return plan_taming(file, choices, read_networks(file), quantizer, {"codebook": CODEBOOK})
