"""format=var: weights and settings of a multi-scale tokenizer in the layout of VAR's code."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import to_setting
from vqgan.export.base import Example, Exporter, to_json
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.formats.pyramid_names import CODEBOOK, SideSizes, SizeReader, name_weights
from vqgan.formats.var import CODE_KERNEL, HITS, JOINT_PARTS, VAR_RESIDUAL, VAR_STYLE
from vqgan.networks.pyramid import LinearAttention, PyramidDecoder, PyramidEncoder
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.ibq import IBQ
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.tokenizer import Tokenizer

VAR_FOLDER = "var"
VAR_WEIGHTS = f"{VAR_FOLDER}/vae.pth"
VAR_CONFIG = f"{VAR_FOLDER}/vae.json"


class VARExporter(Exporter):
    name = "var"
    is_read_back = True
    usage = """\
`var/vae.pth` has the names of VAR's code (FoundationVision/VAR, models/vqvae.py), and `var/vae.json` the arguments of its class:

```python
import json

settings = json.load(open("var/vae.json"))
networks = settings.pop("ch_mult"), settings.pop("num_res_blocks")   # (1, 1, 2, 2, 4) and 2, without a setting in VAR's code
vae = VQVAE(**settings, test_mode=True)
vae.load_state_dict(torch.load("var/vae.pth", weights_only=True))
codes = vae.img_to_idxBl(images)   # float32 (B, 3, H, W) in [-1, 1] -> a list of (B, n * n), one scale after the other
```"""

    def check(self, tokenizer: Tokenizer) -> None:
        if misfit := find_var_misfit(tokenizer):
            raise InputError(
                f"format=var writes VAR's VQVAE, and {misfit}; leave var out of format"
            )

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        content = io.BytesIO()
        torch.save(name_var_tensors(tokenizer), content)
        return {VAR_WEIGHTS: content.getvalue(), VAR_CONFIG: to_json(describe_vqvae(tokenizer))}

    @torch.no_grad()
    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        """By this program's import, whose codes and pictures have to be the same to the bit."""
        file = open_public(str(folder / VAR_WEIGHTS), str(folder / VAR_CONFIG), None).file
        size, channels = tokenizer.encoder.image_size, tokenizer.encoder.channels
        again = load_public(file, Choices(size, channels)).tokenizer
        for each in examples:
            same_codes = torch.equal(again.indices(each.images), each.indices)
            if not (same_codes and torch.equal(again.decode_indices(each.chosen), each.decoded)):
                raise InputError(
                    "format=var was written and imported again, and its codes or pictures are not the tokenizer's; "
                    "leave var out of format"
                )
        return {"imported_again": "the same to the bit"}


def find_var_misfit(tokenizer: Tokenizer) -> str | None:
    """What VAR's VQVAE has no place for, as a clause; None for a tokenizer that it can hold."""
    encoder, decoder, quantizer = tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer
    if not isinstance(quantizer, MultiScaleResidual) or not isinstance(
        quantizer.codebook_of(0), Codebook
    ):
        return f"it has codes of several scales (quantizer=multiscale), which {type(quantizer).__name__} has not"
    if isinstance(inner := quantizer.codebook_of(0), IBQ) and inner.score != "nearest":
        return f"it chooses the nearest of its codes, not by quantizer.inner.score={inner.score}"
    if not quantizer.shared:
        return "its scales share one codebook (quantizer.shared=true)"
    if any(rows != columns for rows, columns in quantizer.scales.sizes):
        return "its grids are square"
    if type(encoder) is not PyramidEncoder or type(decoder) is not PyramidDecoder:
        kinds = f"{type(encoder).__name__} and {type(decoder).__name__}"
        return f"its networks are those of model=pyramid, which {kinds} are not"
    if tokenizer.patches is not None:
        return "it has no linear map of patches beside its networks (model.start=patches)"
    if (encoder.exit_kernel, decoder.entry_kernel) != (CODE_KERNEL, CODE_KERNEL):
        return "its convolutions beside the codes are 3x3 (model=var_f16, or exit_kernel and entry_kernel)"
    if tuple(tokenizer.pixels) != (-1, 1):
        return "its images are in [-1, 1] (model.pixels)"
    layers = {type(layer) for side in (encoder, decoder) for layer in side.modules()}
    if LinearAttention in layers:
        return "it has no linear attention (model.encoder.attention_kind=linear)"
    if layers & {nn.AvgPool2d, nn.Upsample}:
        return "it halves and doubles by convolutions, these networks without (resample_conv=false)"
    if decoder.tanh:
        return "it has no tanh behind its last convolution (model.decoder.tanh=true)"
    into, out = read_var_sizes(tokenizer, name_var_tensors(tokenizer))
    if into.mults is None or into.widths != out.widths or into.blocks + 1 != out.blocks:
        return "its levels are multiples of the first width, the same in its decoder, which has one block a level more"
    last = (len(into.widths) - 1,)
    if (into.attention, out.attention) != (last, last) or not (
        into.middle_attention and out.middle_attention
    ):
        return "it has attention at the grid's resolution and in the middle, and nowhere else (model.attention=[<grid>])"
    return None


def name_var_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights by the names of VAR's code; queries, keys and values in one convolution."""
    state, quantizer = tokenizer.state_dict(), tokenizer.quantizer
    assert isinstance(quantizer, MultiScaleResidual)
    inner = quantizer.codebook_of(0)
    assert isinstance(inner, Codebook)
    tensors: dict[str, Tensor] = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for own, public in name_weights(tokenizer.encoder, tokenizer.decoder, VAR_STYLE).items():
        part = own.split(".")[-2]
        if public.split(".")[-2] == "qkv":
            joint.setdefault(public, {})[part] = state[own]
        else:
            tensors[public] = state[own].contiguous().clone()
    for public, parts in joint.items():
        tensors[public] = torch.cat([parts[name] for name in JOINT_PARTS])
    tensors[CODEBOOK] = inner.codes().detach().clone()
    scales = quantizer.scales
    tensors[HITS] = torch.zeros(len(scales.sizes), quantizer.K)
    for i in range(scales.num_convolutions):
        start = f"{VAR_RESIDUAL}{name_convolution(quantizer, i)}"
        tensors[f"{start}.weight"] = state[f"quantizer.scales.kernel_{i}"].clone()
        tensors[f"{start}.bias"] = state[f"quantizer.scales.bias_{i}"].clone()
    return tensors


def name_convolution(quantizer: MultiScaleResidual, number: int) -> str:
    """What VAR's code calls a convolution: one for all scales, one for several neighbours, or one a scale."""
    n = quantizer.scales.num_convolutions
    if n == 1:
        return "qresi"
    return f"qresi_ls.{number}" if n < len(quantizer.scales.sizes) else str(number)


def describe_vqvae(tokenizer: Tokenizer) -> dict[str, Any]:
    """The arguments of VAR's VQVAE."""
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, MultiScaleResidual)
    encoder, _ = read_var_sizes(tokenizer, name_var_tensors(tokenizer))
    scales = quantizer.scales
    n = scales.num_convolutions
    return {
        "vocab_size": quantizer.K,
        "z_channels": encoder.z_channels,
        "ch": encoder.width,
        "ch_mult": encoder.mults,
        "num_res_blocks": encoder.blocks,
        "using_znorm": False,
        "quant_conv_ks": CODE_KERNEL,
        "quant_resi": scales.strength if n else 0.0,
        "share_quant_resi": 0 if n == len(scales.sizes) and n > 1 else n,
        "v_patch_nums": [to_setting(size) for size in scales.sizes],
    }


def read_var_sizes(tokenizer: Tokenizer, tensors: dict[str, Tensor]) -> tuple[SideSizes, SideSizes]:
    """The sizes of encoder and decoder, as an import reads them."""
    return SizeReader(PublicFile("the export", tensors), VAR_STYLE).read()
