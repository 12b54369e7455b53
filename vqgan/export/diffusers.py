"""format=diffusers: a folder that diffusers' VQModel loads, for the networks that it has."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import to_setting
from vqgan.export.base import Example, Exporter, compare_graphs, to_json
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.diffusers import PARTS, list_sizes, name_diffusers_layer
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.formats.pyramid_names import CODEBOOK, NameStyle, SideSizes, SizeReader, name_weights
from vqgan.formats.spatial_names import SPATIAL_PARTS, SpatialStyle
from vqgan.networks.pyramid import (
    LinearAttention,
    PositionAttention,
    PyramidDecoder,
    PyramidEncoder,
)
from vqgan.networks.spatial import SpatialDecoder
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.ibq import IBQ
from vqgan.tokenizer import Tokenizer

Translation = Callable[[Tensor], Tensor]

FOLDER = "vqvae"  # as in a pipeline, so that the weights beside it have names of their own
DIFFUSERS_WEIGHTS = f"{FOLDER}/diffusion_pytorch_model.safetensors"


class DiffusersExporter(Exporter):
    name = "diffusers"
    is_read_back = True
    usage = """\
`vqvae/` is a model of diffusers:

```python
from diffusers import VQModel

model = VQModel.from_pretrained(".", subfolder="vqvae")
indices = model.quantize(model.encode(images).latents)[2][2]   # float32 (B, C, H, W) in [-1, 1] -> (B * h * w)
z_q = model.quantize.get_codebook_entry(indices, (B, h, w, model.config.vq_embed_dim))
pictures = model.decode(z_q, force_not_quantize=True).sample
```

With `lookup_from_codebook` in its config.json images are in [0, 1], and `model.decode(indices, force_not_quantize=True,
shape=(B, h, w, dim))` takes the indices themselves."""

    def check(self, tokenizer: Tokenizer) -> None:
        if misfit := find_misfit(tokenizer):
            raise InputError(
                f"format=diffusers writes a VQModel, and {misfit}; leave diffusers out of format"
            )

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        tensors = name_tensors(tokenizer)
        settings = describe_vqmodel(tokenizer, tensors)
        return {
            DIFFUSERS_WEIGHTS: save(tensors, {"format": "pt"}),
            f"{FOLDER}/config.json": to_json(settings),
        }

    @torch.no_grad()
    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        """By this program's import, whose codes and pictures have to be the same to the bit, and by diffusers where it is
        installed."""
        file = open_public(str(folder / DIFFUSERS_WEIGHTS), None, None).file
        size, channels = tokenizer.encoder.image_size, tokenizer.encoder.channels
        again = load_public(file, Choices(size, channels)).tokenizer
        for each in examples:
            same_codes = torch.equal(again.indices(each.images), each.indices)
            if not (same_codes and torch.equal(again.decode_indices(each.chosen), each.decoded)):
                raise InputError(
                    "format=diffusers was written and imported again, and its codes or pictures are not the tokenizer's; "
                    "leave diffusers out of format"
                )
        if find_spec("diffusers") is None:
            return {"imported_again": "the same to the bit", "diffusers": "not installed"}
        return compare_graphs(self.name, *open_vqmodel(folder / FOLDER, tokenizer), examples)


def find_misfit(tokenizer: Tokenizer) -> str | None:
    """What VQModel has no place for, as a clause; None for a tokenizer that it can hold."""
    encoder, decoder, quantizer = tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer
    if type(encoder) is not PyramidEncoder or type(decoder) not in (PyramidDecoder, SpatialDecoder):
        kinds = f"{type(encoder).__name__} and {type(decoder).__name__}"
        return f"its networks are those of model=pyramid, which {kinds} are not"
    if tokenizer.patches is not None:
        return "it has no linear map of patches beside its networks (model.start=patches)"
    if not isinstance(quantizer, Codebook):
        return f"it chooses the nearest of its codes, which {type(quantizer).__name__} does not"
    if quantizer.cosine:
        return "it doesn't compare codes at length 1 (quantizer.cosine=true)"
    if isinstance(quantizer, IBQ) and quantizer.score != "nearest":
        return f"it chooses the nearest of its codes, not by quantizer.score={quantizer.score}"
    layers = {type(layer) for side in (encoder, decoder) for layer in side.modules()}
    if LinearAttention in layers:
        return "it has no linear attention (model.encoder.attention_kind=linear)"
    if layers & {nn.AvgPool2d, nn.Upsample}:
        return "it halves and doubles by convolutions, these networks without (resample_conv=false)"
    if decoder.tanh:
        return "it has no tanh behind its last convolution (model.decoder.tanh=true)"
    into, out = read_sizes(tokenizer, name_tensors(tokenizer))
    if into.width != into.widths[0]:
        return f"its first convolution has the {into.widths[0]} channels of the first level, not {into.width}"
    if into.widths != out.widths or into.blocks + 1 != out.blocks:
        return "its decoder has the encoder's widths, and one block a level more"
    if into.middle_attention != out.middle_attention:
        return "it has attention in the middle of both networks or of none"
    return None


def choose_export_style(tokenizer: Tokenizer) -> NameStyle:
    """The names that today's diffusers gives the weights."""
    if isinstance(tokenizer.decoder, SpatialDecoder):
        decoder_parts = {**PARTS, **SPATIAL_PARTS, "norm": "spatial_norm"}
        return SpatialStyle(name_diffusers_layer, PARTS, decoder_parts)
    return NameStyle(name_diffusers_layer, PARTS)


def name_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights by the names of diffusers, and in its shapes: linear layers in attention, and one table of codes."""
    style, state = choose_export_style(tokenizer), tokenizer.state_dict()
    names = name_weights(tokenizer.encoder, tokenizer.decoder, style)
    if isinstance(tokenizer.decoder, SpatialDecoder):
        names |= {f"decoder.entry.{key}": f"post_quant_conv.{key}" for key in ("weight", "bias")}
    linear = {
        f"{name}.{part}.weight"
        for name, module in tokenizer.named_modules()
        if isinstance(module, PositionAttention)
        for part in ("q", "k", "v", "out")
    }
    tensors = {
        public: (state[own].flatten(1) if own in linear else state[own]).contiguous().clone()
        for own, public in names.items()
    }
    assert isinstance(tokenizer.quantizer, Codebook)
    return {**tensors, CODEBOOK: tokenizer.quantizer.codes().detach().clone()}


def read_sizes(tokenizer: Tokenizer, tensors: dict[str, Tensor]) -> tuple[SideSizes, SideSizes]:
    """The sizes of encoder and decoder, as an import reads them."""
    return SizeReader(PublicFile("the export", tensors), choose_export_style(tokenizer)).read()


def describe_vqmodel(tokenizer: Tokenizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """VQModel's config.json."""
    encoder, decoder = read_sizes(tokenizer, tensors)
    norms = [layer for layer in tokenizer.encoder.modules() if isinstance(layer, nn.GroupNorm)]
    K, dim = tensors[CODEBOOK].shape
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "norm_num_groups": norms[0].num_groups,
        "norm_type": "spatial" if isinstance(tokenizer.decoder, SpatialDecoder) else "group",
        "num_vq_embeddings": K,
        "vq_embed_dim": dim,
        "sample_size": to_setting(tokenizer.encoder.image_size),
        # aMUSEd's mark of a model whose images are in [0, 1], by which stage=import knows it.
        "lookup_from_codebook": tuple(tokenizer.pixels) == (0, 1),
        **list_sizes(encoder, decoder),
    }


def open_vqmodel(folder: Path, tokenizer: Tokenizer) -> tuple[Translation, Translation]:
    """Both directions of a VQModel, for images in [-1, 1]."""
    from diffusers import VQModel  # not among this program's requirements

    model = VQModel.from_pretrained(str(folder)).eval()
    unit = tuple(tokenizer.pixels) == (0, 1)

    def encode(images: Tensor) -> Tensor:
        latents = model.encode((images + 1) / 2 if unit else images).latents
        indices = model.quantize(latents)[2][2]
        return torch.as_tensor(indices).reshape(len(images), *latents.shape[2:])

    def decode(indices: Tensor) -> Tensor:
        shape = (*indices.shape, model.config.vq_embed_dim)
        rows = indices.flatten()
        if model.config.lookup_from_codebook:
            pictures = model.decode(rows, force_not_quantize=True, shape=shape).sample
        else:
            z_q = model.quantize.get_codebook_entry(rows, shape)
            pictures = model.decode(z_q, force_not_quantize=True).sample
        return (2 * pictures - 1 if unit else pictures).clamp(-1, 1)

    return encode, decode
