"""Pyramids whose decoder takes the codes into its normalisations: their sizes and public names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from codegrid.engine.sizes import Size
from vqgan.formats.pyramid_names import (
    NameStyle,
    SideSizes,
    describe_pyramid,
    name_weights,
    without_target,
)
from vqgan.networks.pyramid import Place, PyramidEncoder
from vqgan.networks.spatial import SpatialDecoder

SPATIAL_PARTS = {"group_norm": "norm_layer", "scale": "conv_y", "shift": "conv_b"}


@dataclass(frozen=True)
class SpatialStyle(NameStyle):
    """Names of a pyramid with such a decoder; `decoder_parts` are its names of parts, `parts` the encoder's."""

    decoder_parts: Mapping[str, str]

    def name_weight(self, place: Place, key: str) -> str:
        parts = self.decoder_parts if place.side == "decoder" else self.parts
        return NameStyle(self.name_layer, parts).name_weight(place, key)


def describe_spatial(
    encoder: SideSizes,
    decoder: SideSizes,
    image_size: Size,
    pixels: tuple[int, int],
    groups: int,
    dim: int,
) -> dict[str, Any]:
    """The `model` group; `groups` of the encoder's normalisations, `dim` of a code."""
    model = describe_pyramid(encoder, decoder, image_size, pixels)
    model["encoder"] |= {"groups": groups}
    model["decoder"] |= {"_target_": "vqgan.networks.spatial.SpatialDecoder", "dim": dim}
    return model


def name_spatial(model: Mapping[str, Any], style: NameStyle) -> dict[str, str]:
    """The public names of the weights of a `model` group that `describe_spatial` wrote, but for the quantizer's."""
    with torch.device("meta"):
        encoder = PyramidEncoder(**without_target(model["encoder"]))
        decoder = SpatialDecoder(**without_target(model["decoder"]))
    entry = {f"decoder.entry.{key}": f"post_quant_conv.{key}" for key in ("weight", "bias")}
    return name_weights(encoder, decoder, style) | entry
