"""A decoder as a list of plain layers, which decoder.py runs without this program.

Every layer is a dict with its `kind`, and with the names of its tensors `weight` and `bias` where it has any:

    choose    codebook                the indices of one codebook
    cut       first, last, size       the indices of one scale, from a row of several
    look_up   table                   indices -> vectors, by one of the tables in the tensor `codes`
    conv      padding                 a convolution of stride 1
    norm      groups, eps             GroupNorm
    silu, tanh
    shuffle   factor                  depth to space
    enlarge   to                      the arguments of F.interpolate
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
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.tokenizer import Tokenizer

LayerFacts = dict[str, Any]
ENLARGE_TWICE: LayerFacts = {"kind": "enlarge", "to": {"scale_factor": 2.0, "mode": "nearest"}}


def describe_decoding(tokenizer: Tokenizer) -> list[LayerFacts]:
    """From indices to pictures in [-1, 1], with the names of the tokenizer's state dict.

    Raises InputError if a part is none of the layers that decoder.py knows.
    """
    z_q: LayerFacts = {"kind": "add", "branches": describe_lookup(tokenizer.quantizer)}
    layers = [*describe(tokenizer.out, "out"), *describe(tokenizer.decoder, "decoder")]
    if tuple(tokenizer.pixels) != (-1, 1):
        layers.append({"kind": "scale", "times": 2, "plus": -1})
    if tokenizer.patches is None:
        return [z_q, *layers]
    return [z_q, {"kind": "add", "branches": [layers, describe(tokenizer.patches, "patches")]}]


def describe_lookup(quantizer: Quantizer) -> list[list[LayerFacts]]:
    """From indices to what each codebook, or each scale, adds to z_q."""
    if isinstance(quantizer, MultiScaleResidual):
        return [describe_scale(quantizer, k) for k in range(len(quantizer.lengths))]
    return [
        [{"kind": "choose", "codebook": i}, {"kind": "look_up", "table": i}]
        for i in range(quantizer.num_codebooks)
    ]


def describe_scale(quantizer: MultiScaleResidual, scale: int) -> list[LayerFacts]:
    """The codes of a scale, enlarged to the last one; a share of them passes a convolution, as in `Scales.add`."""
    scales = quantizer.scales
    first, last = sum(quantizer.lengths[:scale]), sum(quantizer.lengths[: scale + 1])
    layers: list[LayerFacts] = [
        {"kind": "cut", "first": first, "last": last, "size": list(scales.sizes[scale])},
        {"kind": "look_up", "table": 0 if quantizer.shared else scale},
        {"kind": "enlarge", "to": {"size": list(scales.grid), "mode": "bicubic"}},
    ]
    if not scales.num_convolutions:
        return layers
    number, share = scales.convolution_of(scale), scales.strength
    weight, bias = (f"quantizer.scales.{part}_{number}" for part in ("kernel", "bias"))
    smoothed = [
        {"kind": "conv", "weight": weight, "bias": bias, "padding": 1},
        {"kind": "scale", "times": share, "plus": 0},
    ]
    plain = [{"kind": "scale", "times": 1 - share, "plus": 0}]
    return [*layers, {"kind": "add", "branches": [plain, smoothed]}]


def name_weight_and_bias(name: str) -> LayerFacts:
    return {"weight": f"{name}.weight", "bias": f"{name}.bias"}


@singledispatch
def describe(module: nn.Module, name: str) -> list[LayerFacts]:
    """The layers of a module whose weights are called `name`. A network of another kind registers its own description."""
    raise InputError(
        f"the {name} is of class {type(module).__name__}, which decoder.py of format=safetensors does not know; "
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
    return [{"kind": "conv", **name_weight_and_bias(name), "padding": height // 2}]


@describe.register
def describe_norm(module: nn.GroupNorm, name: str) -> list[LayerFacts]:
    groups, eps = module.num_groups, module.eps
    return [{"kind": "norm", **name_weight_and_bias(name), "groups": groups, "eps": eps}]


@describe.register
def describe_silu(module: nn.SiLU, name: str) -> list[LayerFacts]:
    return [{"kind": "silu"}]


@describe.register
def describe_shuffle(module: nn.PixelShuffle, name: str) -> list[LayerFacts]:
    return [{"kind": "shuffle", "factor": module.upscale_factor}]


@describe.register
def describe_double(module: Double, name: str) -> list[LayerFacts]:
    return [ENLARGE_TWICE, {"kind": "conv", **name_weight_and_bias(name), "padding": 1}]


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
    return [ENLARGE_TWICE]


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
