"""A decoder as a list of plain layers, which decoder.py runs without this program.

Every layer is a dict with its `kind`, and with the `name` of its weights where it has any:

    conv      name, padding           a convolution of stride 1
    norm      name, groups, eps       GroupNorm
    silu, tanh
    shuffle   factor                  depth to space
    enlarge   factor                  each pixel becomes factor x factor equal ones
    attend    inputs                  attention of one head over all positions; inputs are the layers of query, key and value
    scale     times, plus             h * times + plus
    add       branches                the sum of what several lists of layers give from the same input; an empty list is the input
"""

from functools import singledispatch
from typing import Any

from torch import nn

from codegrid.engine.errors import InputError
from vqgan.networks.blocks import ResBlock
from vqgan.networks.decoder import Decoder
from vqgan.networks.maskgit_vqgan import MaskGITBlock
from vqgan.networks.patches import Patches
from vqgan.networks.pyramid import Double, PositionAttention, PyramidBlock, PyramidDecoder
from vqgan.networks.unbiased import UnbiasedDecoder
from vqgan.tokenizer import Tokenizer

LayerFacts = dict[str, Any]


def describe_decoding(tokenizer: Tokenizer) -> list[LayerFacts]:
    """From z_q to pictures in [-1, 1], with the names of the tokenizer's state dict.

    Raises InputError if a part is none of the layers that decoder.py knows.
    """
    layers = [*describe(tokenizer.out, "out"), *describe(tokenizer.decoder, "decoder")]
    if tuple(tokenizer.pixels) != (-1, 1):
        layers.append({"kind": "scale", "times": 2, "plus": -1})
    if tokenizer.patches is None:
        return layers
    return [{"kind": "add", "branches": [layers, describe(tokenizer.patches, "patches")]}]


@singledispatch
def describe(module: nn.Module, name: str) -> list[LayerFacts]:
    """The layers of a module whose weights are called `name`. A network of another kind registers its own description."""
    raise InputError(
        f"the {name} is a {type(module).__name__}, which decoder.py of format=safetensors does not know; "
        "use format=onnx or pt2"
    )


@describe.register
def describe_sequence(module: nn.Sequential, name: str) -> list[LayerFacts]:
    return [layer for i, part in enumerate(module) for layer in describe(part, f"{name}.{i}")]


@describe.register
def describe_identity(module: nn.Identity, name: str) -> list[LayerFacts]:
    return []


@describe.register
def describe_conv(module: nn.Conv2d, name: str) -> list[LayerFacts]:
    (height, width), padding = module.kernel_size, module.padding
    plain = module.stride == (1, 1) and module.dilation == (1, 1) and module.groups == 1
    if not plain or padding != (height // 2, width // 2) or height != width:
        raise InputError(
            f"{name} is a convolution that decoder.py of format=safetensors does not know ({module}); use format=onnx or pt2"
        )
    return [{"kind": "conv", "name": name, "padding": height // 2}]


@describe.register
def describe_norm(module: nn.GroupNorm, name: str) -> list[LayerFacts]:
    return [{"kind": "norm", "name": name, "groups": module.num_groups, "eps": module.eps}]


@describe.register
def describe_silu(module: nn.SiLU, name: str) -> list[LayerFacts]:
    return [{"kind": "silu"}]


@describe.register
def describe_shuffle(module: nn.PixelShuffle, name: str) -> list[LayerFacts]:
    return [{"kind": "shuffle", "factor": module.upscale_factor}]


@describe.register
def describe_double(module: Double, name: str) -> list[LayerFacts]:
    return [{"kind": "enlarge", "factor": 2}, {"kind": "conv", "name": name, "padding": 1}]


def describe_branch(module: ResBlock | PyramidBlock, name: str) -> list[LayerFacts]:
    """Normalisation, SiLU and convolution, twice."""
    silu: LayerFacts = {"kind": "silu"}
    first = [
        *describe(module.norm1, f"{name}.norm1"),
        silu,
        *describe(module.conv1, f"{name}.conv1"),
    ]
    last = [
        *describe(module.norm2, f"{name}.norm2"),
        silu,
        *describe(module.conv2, f"{name}.conv2"),
    ]
    return [*first, *last]


@describe.register
def describe_block(module: ResBlock, name: str) -> list[LayerFacts]:
    return [{"kind": "add", "branches": [[], describe_branch(module, name)]}]


@describe.register
def describe_pyramid_block(module: PyramidBlock, name: str) -> list[LayerFacts]:
    shortcut = describe(module.shortcut, f"{name}.shortcut")
    return [{"kind": "add", "branches": [shortcut, describe_branch(module, name)]}]


@describe.register
def describe_attention(module: PositionAttention, name: str) -> list[LayerFacts]:
    inputs = [describe(getattr(module, part), f"{name}.{part}")[0] for part in ("q", "k", "v")]
    branch = [
        *describe(module.norm, f"{name}.norm"),
        {"kind": "attend", "inputs": inputs},
        *describe(module.out, f"{name}.out"),
    ]
    return [{"kind": "add", "branches": [[], branch]}]


@describe.register
def describe_upsample(module: nn.Upsample, name: str) -> list[LayerFacts]:
    return [{"kind": "enlarge", "factor": 2}]


@describe.register
def describe_maskgit_block(module: MaskGITBlock, name: str) -> list[LayerFacts]:
    branch = describe_branch(module, name)
    if not module.widths_differ:
        return [{"kind": "add", "branches": [[], branch]}]
    shortcut = describe(module.shortcut, f"{name}.shortcut")
    return [*branch, {"kind": "add", "branches": [[], shortcut]}]


@describe.register
def describe_decoder(module: Decoder, name: str) -> list[LayerFacts]:
    parts = {"layers": module.layers, "last": module.last, "shuffle": module.shuffle}
    return [layer for key, part in parts.items() for layer in describe(part, f"{name}.{key}")]


@describe.register
def describe_unbiased_decoder(module: UnbiasedDecoder, name: str) -> list[LayerFacts]:
    return [*describe(module.layers, f"{name}.layers"), *describe(module.last, f"{name}.last")]


@describe.register
def describe_pyramid_decoder(module: PyramidDecoder, name: str) -> list[LayerFacts]:
    layers = [*describe(module.layers, f"{name}.layers"), *describe(module.last, f"{name}.last")]
    return [*layers, {"kind": "tanh"}] if module.tanh else layers


@describe.register
def describe_patches(module: Patches, name: str) -> list[LayerFacts]:
    return describe(module.out, f"{name}.out")
