"""The layers of a pyramid and their public names: each format says how it names a place; names and sizes follow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, round_to_multiples, to_setting, write_size
from vqgan.formats.base import Choices, PublicFile
from vqgan.networks.base import ImageDecoder, ImageEncoder
from vqgan.networks.pyramid import Place, PyramidDecoder, PyramidEncoder

CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class NameStyle:
    """How a format names the weights of a pyramid.

    name_layer    a place -> the public name of its layer
    parts         this project's names of a layer's parts -> the public ones, where they differ: shortcut, norm, q, k, v, qkv, out
    """

    name_layer: Callable[[Place], str]
    parts: Mapping[str, str]

    def name_weight(self, place: Place, key: str) -> str:
        """The public name of a weight, such as conv1.weight, of the layer at a place."""
        inner = [self.parts.get(part, part) for part in key.split(".")]
        return ".".join([self.name_layer(place), *inner])


def name_weights(encoder: ImageEncoder, decoder: ImageDecoder, style: NameStyle) -> dict[str, str]:
    """This project's names of the weights of two networks with `places`, `layers` and `last`, and of the convolutions beside the
    codes -> the public names."""
    names = {}
    for side, network in (("encoder", encoder), ("decoder", decoder)):
        places: list[Place] = network.places  # type: ignore[assignment]
        layers: nn.Sequential = network.layers  # type: ignore[assignment]
        for i, (place, layer) in enumerate(zip(places, layers, strict=True)):
            for key in layer.state_dict():
                names[f"{side}.layers.{i}.{key}"] = style.name_weight(place, key)
    for key in ("weight", "bias"):
        names[f"decoder.last.{key}"] = style.name_weight(Place("decoder", "exit"), key)
        if encoder.exit_kernel:
            names[f"into.{key}"] = f"quant_conv.{key}"
        if decoder.entry_kernel:
            names[f"out.{key}"] = f"post_quant_conv.{key}"
    return names


@dataclass(frozen=True)
class SideSizes:
    """The sizes of one side of a pyramid, as its weights have them.

    channels            of the images
    z_channels          of the features at the grid
    width               channels of the encoder's first convolution, also in the decoder's sizes
    widths              channels of each level, from the image's down to the grid's
    blocks              a level
    attention           levels with attention
    middle_attention    whether the middle has one
    resample_conv       whether convolutions halve and double
    """

    channels: int
    z_channels: int
    width: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    middle_attention: bool
    resample_conv: bool

    @property
    def f(self) -> int:
        """Pixels a code, in each direction."""
        return 2 ** (len(self.widths) - 1)

    @property
    def mults(self) -> list[int] | None:
        """Widths as multiples of the first convolution's; None if they are none."""
        if any(width % self.width for width in self.widths):
            return None
        return [width // self.width for width in self.widths]

    def in_words(self, words: Mapping[str, str]) -> dict[str, Any]:
        """Sizes by a format's own words for them: {"ch": "width"} gives {"ch": 128}."""
        return {word: getattr(self, name) for word, name in words.items()}

    def describe(self, image_size: Size) -> dict[str, Any]:
        """The settings that PyramidEncoder and PyramidDecoder of these sizes share, but for depth."""
        settings: dict[str, Any] = {
            "image_size": to_setting(image_size),
            "channels": self.channels,
            "grid": to_setting((image_size[0] // self.f, image_size[1] // self.f)),
            "width": self.width,
            "mults": self.mults,
            "attention": [
                to_setting((image_size[0] >> level, image_size[1] >> level))
                for level in self.attention
            ],
            "z_channels": self.z_channels,
            "middle_attention": self.middle_attention,
            "resample_conv": self.resample_conv,
        }
        return {**settings, "widths": list(self.widths)} if self.mults is None else settings


class SizeReader:
    """Reads the sizes of a pyramid off the names and shapes of a public file."""

    def __init__(self, file: PublicFile, style: NameStyle) -> None:
        self.file = file
        self.style = style

    def read(self) -> tuple[SideSizes, SideSizes]:
        """The sizes of encoder and decoder. Raises InputError if a weight that says them is missing."""
        levels = 0
        while self.has(self.block("encoder", levels, levels, 0), "conv1.weight"):
            levels += 1
        encoder, decoder = self.read_side("encoder", levels), self.read_side("decoder", levels)
        return encoder, replace(decoder, width=encoder.width)

    def read_side(self, side: str, levels: int) -> SideSizes:
        is_encoder = side == "encoder"
        entry = self.shape(Place(side, "entry"), "weight")
        end = self.shape(Place(side, "exit"), "weight")
        steps = [(level, level if is_encoder else levels - 1 - level) for level in range(levels)]
        blocks = 0
        while self.has(self.block(side, *steps[0], blocks), "conv1.weight"):
            blocks += 1
        widths = [
            self.shape(self.block(side, level, step, 0), "conv1.weight")[0] for level, step in steps
        ]
        halving = Place(side, "resample", *steps[0 if is_encoder else -1])
        return SideSizes(
            channels=entry[1] if is_encoder else end[0],
            z_channels=end[0] if is_encoder else entry[1],
            width=entry[0],
            widths=tuple(widths),
            blocks=blocks,
            attention=tuple(
                level
                for level, step in steps
                if self.has_layer(Place(side, "attention", level, step))
            ),
            middle_attention=self.has_layer(Place(side, "attention")),
            resample_conv=levels == 1 or self.has_layer(halving),
        )

    @staticmethod
    def block(side: str, level: int, step: int, number: int) -> Place:
        return Place(side, "block", level, step, number)

    def has(self, place: Place, key: str) -> bool:
        return self.style.name_weight(place, key) in self.file.tensors

    def has_layer(self, place: Place) -> bool:
        """Whether the file has any weight of the layer at a place."""
        start = f"{self.style.name_layer(place)}."
        return any(name.startswith(start) for name in self.file.tensors)

    def shape(self, place: Place, key: str) -> tuple[int, ...]:
        return tuple(require(self.file, self.style.name_weight(place, key), dims=4).shape)


def require(file: PublicFile, name: str, dims: int = 2) -> Tensor:
    """The tensor of this name and number of axes, those of a codebook by default. Raises InputError if the file has none."""
    if name not in file.tensors:
        raise InputError(
            f"{file.source} has no {name}, which tokenizers of its kind have; the file is incomplete"
        )
    tensor = file.tensors[name]
    if tensor.dim() != dims:
        raise InputError(
            f"{name} of {file.source} has the shape {list(tensor.shape)}, where tokenizers of its kind have {dims} axes"
        )
    return tensor


def check_images(file: PublicFile, choices: Choices, channels: tuple[int, int], f: int) -> None:
    """Raise InputError unless networks give the channels that they take, and f, their pixels a code, divides the images at hand."""
    into, out = channels
    if into != out:
        raise InputError(
            f"{file.source} takes images of {into} channels and gives images of {out}; a tokenizer gives what it takes"
        )
    size = choices.image_size
    if size[0] % f or size[1] % f:
        sizes = " or ".join(map(write_size, round_to_multiples(size, f)))
        raise InputError(
            f"data.image_size={write_size(size)} is not divisible by f={f} of {file.source}; use data.image_size={sizes}"
        )


def describe_pyramid(
    encoder: SideSizes,
    decoder: SideSizes,
    image_size: Size,
    pixels: tuple[int, int],
    **options: Any,
) -> dict[str, Any]:
    """The `model` group of a pyramid of these sizes; `options` are settings of both its networks."""
    into = {**encoder.describe(image_size), **options}
    out = {**decoder.describe(image_size), **options}
    shared = {key: into[key] for key in ("grid", "width", "mults", "attention", "z_channels")}
    return {
        **shared,
        "depth": encoder.blocks,
        "start": "random",
        "pixels": list(pixels),
        "encoder": {
            "_target_": "vqgan.networks.pyramid.PyramidEncoder",
            **into,
            "depth": encoder.blocks,
        },
        "decoder": {
            "_target_": "vqgan.networks.pyramid.PyramidDecoder",
            **out,
            "depth": decoder.blocks - 1,  # the class adds one
        },
    }


def name_pyramid(model: Mapping[str, Any], style: NameStyle) -> dict[str, str]:
    """The public names of the weights of a `model` group that `describe_pyramid` wrote, but for the quantizer's."""
    with torch.device("meta"):
        encoder = PyramidEncoder(**without_target(model["encoder"]))
        decoder = PyramidDecoder(**without_target(model["decoder"]))
    return name_weights(encoder, decoder, style)


def without_target(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments among the settings of a class."""
    return {key: value for key, value in settings.items() if key != "_target_"}
