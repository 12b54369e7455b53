"""VAR's multi-scale tokenizer: taming's networks with joint attention, and one codebook for grids of several sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, SizeSetting, to_setting, write_size
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config
from vqgan.formats.pyramid_names import (
    CODEBOOK,
    NameStyle,
    SizeReader,
    check_images,
    describe_pyramid,
    name_pyramid,
    require,
)
from vqgan.formats.taming import (
    CHARACTERISTIC,
    JOINT_ATTENTION,
    TAMING_WORDS,
    check_latents,
    name_layer,
    refuse_cosine,
)
from vqgan.quantizers.scales import check_scales, scale_sizes, write_sizes

HITS = "quantize.ema_vocab_hit_SV"  # (scales, K): how often each scale chose a code
VAR_RESIDUAL = "quantize.quant_resi."
JOINT_PARTS = ("q", "k", "v")  # in this order in the rows of qkv
VAR_STYLE = NameStyle(
    name_layer,
    {"shortcut": "nin_shortcut", "out": "proj_out"} | dict.fromkeys(JOINT_PARTS, "qkv"),
)
CODE_KERNEL = 3  # of the convolutions beside the codes
STRENGTH = 0.5  # quant_resi of published models
# v_patch_nums of published models, by the side of the last grid: of 256 and of 512 pixels.
PUBLISHED_SCALES = {
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


class VARVQVAE(Format):
    """Codes at several scales, each for what those before leave of the latents."""

    title = "VAR's multi-scale VQVAE"

    def recognises(self, file: PublicFile) -> bool:
        return file.tensors.keys() >= {*CHARACTERISTIC, CODEBOOK, JOINT_ATTENTION}

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        refuse_cosine(file, choices)
        config = file.settings
        if config.get("using_znorm") is True:
            raise InputError(
                f"{file.source} compares codes by their direction (using_znorm), which is not built here for several scales"
            )
        encoder, decoder = SizeReader(file, VAR_STYLE).read()
        check_latents(file, encoder)
        check_images(file, choices, (encoder.channels, decoder.channels), encoder.f)
        K, dim = require(file, CODEBOOK).shape
        convolutions = name_convolutions(file)
        check_config(file, config, {"vocab_size": K, "quant_conv_ks": CODE_KERNEL})
        check_config(file, config, encoder.in_words(TAMING_WORDS))
        grid = (choices.image_size[0] // encoder.f, choices.image_size[1] // encoder.f)
        scales, remarks = choose_scales(file, choices, grid)
        strength = abs(float(config.get("quant_resi", STRENGTH)))
        if convolutions and "quant_resi" not in config:
            remarks.append(
                f"quant_resi={STRENGTH}, as published models have it, for no config says it"
            )
        model = describe_pyramid(encoder, decoder, choices.image_size, choices.pixels or (-1, 1))
        model["encoder"]["exit_kernel"] = model["decoder"]["entry_kernel"] = CODE_KERNEL
        names = name_pyramid(model, VAR_STYLE)
        transforms = split_attention(names)
        return Plan(
            model,
            describe_quantizer(K, dim, scales, len(convolutions), strength),
            names | {"quantizer.inner.0.codebook": CODEBOOK, **convolutions},
            transforms,
            frozenset({HITS} & file.tensors.keys()),
            tuple(remarks),
        )


def name_convolutions(file: PublicFile) -> dict[str, str]:
    """The names of the convolutions behind enlarged codes: shared by neighbouring scales, one for all, or one a scale."""
    names: dict[str, str] = {}
    for start in (f"{VAR_RESIDUAL}qresi_ls.", VAR_RESIDUAL):
        i = 0
        while f"{start}{i}.weight" in file.tensors:
            names[f"quantizer.scales.kernel_{i}"] = f"{start}{i}.weight"
            names[f"quantizer.scales.bias_{i}"] = f"{start}{i}.bias"
            i += 1
    if f"{VAR_RESIDUAL}qresi.weight" in file.tensors:
        names["quantizer.scales.kernel_0"] = f"{VAR_RESIDUAL}qresi.weight"
        names["quantizer.scales.bias_0"] = f"{VAR_RESIDUAL}qresi.bias"
    return names


def split_attention(names: Mapping[str, str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What takes queries, keys and values out of the rows of their joint convolution, by this project's names."""

    def take(i: int) -> Callable[[Tensor], Tensor]:
        return lambda joint: joint.chunk(3)[i]

    return {
        own: take(JOINT_PARTS.index(own.split(".")[-2]))
        for own, public in names.items()
        if public.split(".")[-2] == "qkv"
    }


def choose_scales(
    file: PublicFile, choices: Choices, grid: Size
) -> tuple[tuple[Size, ...], list[str]]:
    """The sizes of all grids for images with this one, and what was assumed.

    Raises InputError if neither the command nor the config says them and they are not the published ones, and for another number
    than the file has.
    """
    number = len(file.tensors[HITS]) if HITS in file.tensors else None
    remarks: list[str] = []
    sides: Sequence[SizeSetting] | None = choices.scales or file.settings.get("v_patch_nums")
    if sides is not None and number not in (None, len(check_scales(sides))):
        name = "v_patch_nums" if choices.scales is None else "quantizer.scales"
        raise InputError(
            f"{name}={write_sizes(check_scales(sides))} are {len(sides)} grids, and {file.source} counts the codes of {number} "
            f"({HITS}); give the sides of as many"
        )
    if choices.scales is None and sides is not None:
        own = check_scales(sides)
        if own[-1] != grid:
            remarks.append(
                f"its scales are {write_sizes(own)}, which are scaled to the {write_size(grid)} codes a side of these images"
            )
        return scale_sizes(own, grid), remarks
    if sides is None:
        sides = PUBLISHED_SCALES.get(max(grid))
        if sides is None or (number not in (None, len(sides))):
            has = "" if number is None else f"the {number} "
            raise InputError(
                f"{file.source} does not say the sides of {has}grids that an image of {write_size(grid)} codes a side has; name "
                f"its config with v_patch_nums by config=<file>, or give them: quantizer.scales=[1,2,...,{max(grid)}]"
            )
        remarks.append(
            f"v_patch_nums={write_sizes(check_scales(sides))}, as published models have it, for no config says it"
        )
        return scale_sizes(check_scales(sides), grid), remarks
    sizes = check_scales(sides)
    if sizes[-1] != grid:
        raise InputError(
            f"quantizer.scales={write_sizes(sizes)} must end with {write_size(grid)}, the codes a side of these images"
        )
    return sizes, remarks


def describe_quantizer(
    K: int, dim: int, scales: Sequence[Size], tensors: int, strength: float
) -> dict[str, Any]:
    """The `quantizer` group, for so many tensors of convolutions, two each."""
    inner = read_quantizer("vq", K=K, dim=dim, kmeans=False)
    return {
        "_target_": "vqgan.quantizers.multiscale.MultiScaleResidual",
        "K": K,
        "dim": dim,
        "scales": [to_setting(size) for size in scales],
        "shared": True,
        "convolutions": tensors // 2,
        "strength": strength,
        "from": 0,  # its codes are in use
        "inner": {"_partial_": True, **inner},
    }
