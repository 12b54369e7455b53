"""What the formats of networks without biases share: names, sizes, and the `model` group of a run's config."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, to_setting
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.public_config import check_config
from vqgan.formats.pyramid_names import (
    NameStyle,
    SideSizes,
    SizeReader,
    check_images,
    name_weights,
)
from vqgan.networks.pyramid import Place
from vqgan.networks.unbiased import UnbiasedDecoder, UnbiasedEncoder

Networks = tuple[type[UnbiasedEncoder], type[UnbiasedDecoder]]


def place_namer(middle: str, resampling: dict[str, str]) -> Callable[[Place], str]:
    """Names of layers as in taming-transformers, but for `middle` and, by side, for the layers between resolutions."""

    def name_layer(place: Place) -> str:
        ends = {"entry": "conv_in", "norm": "norm_out", "exit": "conv_out"}
        if place.kind in ends:
            return f"{place.side}.{ends[place.kind]}"
        if place.kind == "modulation":
            return f"{place.side}.adaptive.{place.level}"
        if place.is_middle:
            return f"{place.side}.{middle}.{place.number}"
        level = f"{place.side}.{'down' if place.side == 'encoder' else 'up'}.{place.level}"
        if place.kind == "resample":
            return f"{level}.{resampling[place.side]}"
        return f"{level}.{place.kind}.{place.number}"

    return name_layer


def describe_unbiased(
    file: PublicFile,
    choices: Choices,
    style: NameStyle,
    networks: Networks,
    pixels: tuple[int, int],
    config: Mapping[str, Any],
    words: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The `model` group of these networks in the sizes of the file's weights, and the public names of their weights.

    Raises InputError for images that they don't take, and if the `config` of the networks, in these `words`, is of other sizes.
    """
    encoder, decoder = SizeReader(file, style).read()
    f = encoder.f
    check_images(file, choices, (encoder.channels, decoder.channels), f)
    check_config(file, config, encoder.in_words(words))
    grid = (choices.image_size[0] // f, choices.image_size[1] // f)
    sides = [describe_side(file, sizes, grid, f) for sizes in (encoder, decoder)]
    with torch.device("meta"):
        built = networks[0](**sides[0]), networks[1](**sides[1])
    shared = {key: sides[0][key] for key in ("grid", "width", "mults", "depth", "z_channels")}
    model: dict[str, Any] = {**shared, "start": "random", "pixels": list(pixels)}
    for side, network, sizes in zip(("encoder", "decoder"), networks, sides, strict=True):
        model[side] = {"_target_": f"{network.__module__}.{network.__qualname__}", **sizes}
    return model, name_weights(*built, style)


def describe_side(file: PublicFile, sizes: SideSizes, grid: Size, f: int) -> dict[str, Any]:
    """The settings of one network. Raises InputError for widths that its code can't make."""
    if any(width % sizes.width for width in sizes.widths):
        raise InputError(
            f"{file.source} has levels of {', '.join(map(str, sizes.widths))} channels, and all must be multiples of "
            f"{sizes.width}, the channels of its first layer; the file is of another kind than its names say"
        )
    return {
        "image_size": to_setting((grid[0] * f, grid[1] * f)),
        "channels": sizes.channels,
        "grid": to_setting(grid),
        "width": sizes.width,
        "mults": [width // sizes.width for width in sizes.widths],
        "depth": sizes.blocks,
        "z_channels": sizes.z_channels,
    }
