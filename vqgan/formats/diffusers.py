"""diffusers' VQModel: taming's networks under other names, or MoVQ's, as pipelines hold them in vqvae/ and movq/."""

from typing import Any

from codegrid.engine.errors import InputError, check_int
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config
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
from vqgan.formats.spatial_names import (
    SPATIAL_PARTS,
    SpatialStyle,
    describe_spatial,
    name_spatial,
)
from vqgan.formats.taming import check_latents, refuse_cosine
from vqgan.networks.pyramid import Place

PARTS = {
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
OLD_PARTS = {**PARTS, "q": "query", "k": "key", "v": "value", "out": "proj_attn"}
DIFFUSERS_WORDS = {
    "in_channels": "channels",
    "layers_per_block": "blocks",
    "latent_channels": "z_channels",
    "mid_block_add_attention": "middle_attention",
}
DEFAULT_GROUPS = 32  # what a config without norm_num_groups means
ACTIVATIONS = ("silu", "swish")


def name_diffusers_layer(place: Place) -> str:
    """The name of a layer; levels are counted in the order in which they run."""
    ends = {"entry": "conv_in", "norm": "conv_norm_out", "exit": "conv_out"}
    if place.kind in ends:
        return f"{place.side}.{ends[place.kind]}"
    is_encoder = place.side == "encoder"
    level = f"{place.side}.{'down' if is_encoder else 'up'}_blocks.{place.step}"
    if place.kind == "resample":
        return f"{level}.{'down' if is_encoder else 'up'}samplers.0.conv"
    part = f"{place.side}.mid_block" if place.is_middle else level
    return f"{part}.{'resnets' if place.kind == 'block' else 'attentions'}.{place.number}"


class DiffusersVQ(Format):
    """A codebook of which the nearest code is chosen, between networks of any widths and groups."""

    title = "diffusers' VQModel"

    def recognises(self, file: PublicFile) -> bool:
        blocks = {
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight",
        }
        return file.tensors.keys() >= {*blocks, CODEBOOK}

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        refuse_cosine(file, choices)
        K, dim = require(file, CODEBOOK).shape
        is_spatial = "decoder.conv_norm_out.norm_layer.weight" in file.tensors
        style = choose_style(file, is_spatial)
        encoder, decoder = SizeReader(file, style).read()
        check_latents(file, encoder)
        check_images(file, choices, (encoder.channels, decoder.channels), encoder.f)
        groups = read_groups(file)
        sizes = {
            "num_vq_embeddings": K,
            "vq_embed_dim": dim,
            "norm_type": "spatial" if is_spatial else "group",
            **list_sizes(encoder, decoder),
        }
        check_config(file, file.settings, sizes)
        pixels, remarks = choose_pixels(file, choices)
        if is_spatial:
            model = describe_spatial(encoder, decoder, choices.image_size, pixels, groups, dim)
            names = name_spatial(model, style)
        else:
            size = choices.image_size
            model = describe_pyramid(encoder, decoder, size, pixels, groups=groups)
            names = name_pyramid(model, style)
        quantizer = read_quantizer("vq", K=K, dim=dim, kmeans=False)
        return Plan(model, quantizer, names | {"quantizer.codebook": CODEBOOK}, remarks=remarks)


def choose_style(file: PublicFile, is_spatial: bool) -> NameStyle:
    """The names of this file: those of attention changed once."""
    is_old = any(name.endswith(".query.weight") for name in file.tensors)
    parts = OLD_PARTS if is_old else PARTS
    if not is_spatial:
        return NameStyle(name_diffusers_layer, parts)
    decoder_parts = {**parts, **SPATIAL_PARTS, "norm": "spatial_norm"}
    return SpatialStyle(name_diffusers_layer, parts, decoder_parts)


def read_groups(file: PublicFile) -> int:
    """The groups of each normalisation. Raises InputError without a config, or for one that can't be built."""
    settings = file.settings
    if not settings:
        raise InputError(
            f"{file.source} needs its config.json: the groups of its normalisations (norm_num_groups) are not in its weights; "
            f"put it beside the weights, or name it with config=<file>"
        )
    activation = settings.get("act_fn", "silu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{file.source}: act_fn={activation} must be silu; its networks can't be built with another activation"
        )
    groups: int = settings.get("norm_num_groups", DEFAULT_GROUPS)
    check_int(f"{file.source}: norm_num_groups", groups, 1)
    return groups


def list_sizes(encoder: SideSizes, decoder: SideSizes) -> dict[str, Any]:
    """The settings of a config that these sizes determine."""
    levels = range(len(encoder.widths))
    down = [("Attn" if i in encoder.attention else "") + "DownEncoderBlock2D" for i in levels]
    up = [("Attn" if i in decoder.attention else "") + "UpDecoderBlock2D" for i in levels]
    return {
        **encoder.in_words(DIFFUSERS_WORDS),
        "out_channels": decoder.channels,
        "block_out_channels": list(encoder.widths),
        "down_block_types": down,
        "up_block_types": up[::-1],
    }


def choose_pixels(file: PublicFile, choices: Choices) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The range of the images that its networks take and give, and what was assumed where the command doesn't say it."""
    if choices.pixels:
        return choices.pixels, ()
    if file.settings.get("lookup_from_codebook"):
        return (0, 1), (
            "configs of diffusers don't say the range of the images: they are taken to be in [0, 1], for this one has "
            "lookup_from_codebook=true as aMUSEd's has; pixels=[-1,1] is the other reading",
        )
    return (-1, 1), (
        "configs of diffusers don't say the range of the images: they are taken to be in [-1, 1], as those of latent "
        "diffusion, VQ-Diffusion and Kandinsky; pixels=[0,1] is the other reading, for models of diffusers' own training script",
    )
