"""TiTok, in both layouts that were published: pixels by way of a VQGAN's codes, and pixels at once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, write_size
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.maskgit import MASKGIT_STYLE
from vqgan.formats.open_magvit2 import order_as_pixel_shuffle
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config, read_section
from vqgan.formats.pyramid_names import CODEBOOK, NameStyle, SizeReader, check_images, require
from vqgan.networks.pyramid import Place
from vqgan.networks.titok import BaseTiTokDecoder, TiTokCodeDecoder, TiTokDecoder, TiTokEncoder

LATENTS = "latent_tokens"
CODE_LOGITS = "decoder.ffn.2.weight"  # of a VQGAN's codes, in the first layout alone
PIXEL_CODEBOOK = "pixel_quantize.embedding.weight"
PIXEL_NETWORK = "pixel_decoder"
HEAD_WIDTH = 64  # channels, of all published models
LENGTH_WORD = "use_l2_norm"
HEAD_WORD = "vit_head_width"  # of this program, for models that aren't of the published sizes
BLOCK_PARTS = {  # of a block, by this program's names
    "norm1.weight": "ln_1.weight", "norm1.bias": "ln_1.bias", "norm2.weight": "ln_2.weight", "norm2.bias": "ln_2.bias",
    "qkv.weight": "attn.in_proj_weight", "qkv.bias": "attn.in_proj_bias",
    "proj.weight": "attn.out_proj.weight", "proj.bias": "attn.out_proj.bias",
    "mlp.up.weight": "mlp.c_fc.weight", "mlp.up.bias": "mlp.c_fc.bias",
    "mlp.down.weight": "mlp.c_proj.weight", "mlp.down.bias": "mlp.c_proj.bias",
}  # fmt: skip


class TiTok(Format):
    """A row of codes without places."""

    title = "TiTok (1d-tokenizer)"

    def recognises(self, file: PublicFile) -> bool:
        return file.tensors.keys() >= {LATENTS, "encoder.patch_embed.weight", CODEBOOK}

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        encoder, decoder = (SideReader(file, side) for side in ("encoder", "decoder"))
        K, dim = require(file, CODEBOOK).shape
        is_legacy = CODE_LOGITS in file.tensors
        patch, channels = read_patches(file)
        check_served(file, choices, (encoder.side * patch, encoder.side * patch))
        check_images(file, choices, (channels, read_outputs(file, is_legacy)), patch)
        config = read_section(file.settings, "model", "vq_model")
        tokens = require(file, LATENTS).shape[0]
        sizes = {
            "codebook_size": K,
            "token_size": dim,
            "num_latent_tokens": tokens,
            "vit_enc_patch_size": patch,
            "is_legacy": is_legacy,
        }
        check_config(file, config, sizes)
        head_width, about_heads = choose_head_width(file, choices, config)
        cosine, about_lengths = choose_lengths(file, choices, config, is_legacy)
        size = encoder.side * patch
        shared = {"image_size": size, "channels": channels, "grid": [1, tokens]}
        own = {**shared, "patch": patch, **encoder.describe(head_width), "mixes": is_legacy}
        kind, ends = describe_ends(file, is_legacy)
        patched = {**shared, "patch": size // decoder.side}
        other = {**patched, **decoder.describe(head_width), **ends}
        model = {
            "grid": [1, tokens],
            "head_width": head_width,
            "start": "random",
            "pixels": list(choices.pixels or (0, 1)),
            "encoder": {"_target_": full_name(TiTokEncoder), **own},
            "decoder": {"_target_": full_name(kind), **other},
        }
        with torch.device("meta"):
            built = kind(**other)
        return Plan(
            model,
            read_quantizer("vq", K=K, dim=dim, cosine=cosine, kmeans=False),
            name_titok(encoder.depth, built),
            order_ends(built),
            remarks=(*about_heads, *about_lengths),
        )


@dataclass(frozen=True)
class SideReader:
    """Reads the sizes of one transformer off the names and shapes of a public file."""

    file: PublicFile
    name: str

    @property
    def width(self) -> int:
        return int(require(self.file, f"{self.name}.positional_embedding").shape[1])

    @property
    def side(self) -> int:
        """Patches a side. Raises InputError for another number of positions than a square and a class token have."""
        n = require(self.file, f"{self.name}.positional_embedding").shape[0] - 1
        side = math.isqrt(n)
        if side**2 != n or not n:
            raise InputError(
                f"{self.file.source} has {n} positions of patches in {self.name}.positional_embedding, which are no square; the "
                "file is of another kind than its names say"
            )
        return side

    @property
    def depth(self) -> int:
        """The number of blocks."""
        depth = 0
        while f"{self.name}.transformer.{depth}.ln_1.weight" in self.file.tensors:
            depth += 1
        return depth

    @property
    def mlp_ratio(self) -> int:
        up = require(self.file, f"{self.name}.transformer.0.mlp.c_fc.weight").shape
        return int(up[0] // up[1])

    def describe(self, head_width: int) -> dict[str, int]:
        """The settings of a network whose heads have so many channels. Raises InputError for a width that is no multiple."""
        if self.width % head_width:
            raise InputError(
                f"head_width={head_width} doesn't divide the {self.width} channels of the {self.name} of "
                f"{self.file.source}; use another"
            )
        heads = self.width // head_width
        return {
            "width": self.width,
            "depth": self.depth,
            "heads": heads,
            "mlp_ratio": self.mlp_ratio,
        }


def read_patches(file: PublicFile) -> tuple[int, int]:
    """Pixels of a patch's side, and channels of an image, that the encoder takes."""
    shape = require(file, "encoder.patch_embed.weight", dims=4).shape
    return int(shape[2]), int(shape[1])


def read_outputs(file: PublicFile, is_legacy: bool) -> int:
    """The channels of the pictures."""
    last = f"{PIXEL_NETWORK}.conv_out.weight" if is_legacy else "decoder.conv_out.weight"
    return int(require(file, last, dims=4).shape[0])


def check_served(file: PublicFile, choices: Choices, size: Size) -> None:
    """Raise InputError for images of another size than the one of the weights."""
    if choices.image_size != size:
        raise InputError(
            f"data.image_size={write_size(choices.image_size)}: {file.source} serves {write_size(size)} pixels alone; "
            f"use data.image_size={write_size(size)}"
        )


def choose_head_width(
    file: PublicFile, choices: Choices, config: Mapping[str, Any]
) -> tuple[int, tuple[str, ...]]:
    """Channels of a head, and what was assumed. Raises InputError if command and config differ, and if neither says it and the
    widths are no multiples of the usual one."""
    stated = config.get(HEAD_WORD)
    if stated is not None and choices.head_width not in (None, stated):
        raise InputError(
            f"head_width={choices.head_width} contradicts {HEAD_WORD}={stated} in the config of {file.source}; "
            "leave head_width out"
        )
    if stated is not None or choices.head_width is not None:
        return int(stated or choices.head_width or 0), ()
    widths = [SideReader(file, side).width for side in ("encoder", "decoder")]
    if any(width % HEAD_WIDTH for width in widths):
        raise InputError(
            f"{file.source} has transformers of {' and '.join(map(str, widths))} channels, and nothing says how many an attention "
            f"head has: the published ones have {HEAD_WIDTH}; add head_width=8, for example"
        )
    is_published = config.get("vit_enc_model_size") is not None
    remark = f"attention heads of {HEAD_WIDTH} channels are assumed, as all published TiToks have"
    return HEAD_WIDTH, () if is_published else (remark,)


def choose_lengths(
    file: PublicFile, choices: Choices, config: Mapping[str, Any], is_legacy: bool
) -> tuple[bool, tuple[str, ...]]:
    """Whether outputs and codes are compared at length 1, and what was assumed. Raises InputError if command and config differ."""
    stated = config.get(LENGTH_WORD)
    if stated is not None and choices.cosine not in (None, bool(stated)):
        raise InputError(
            f"quantizer.cosine={str(choices.cosine).lower()} contradicts {LENGTH_WORD}={str(stated).lower()} in the config of "
            f"{file.source}; leave quantizer.cosine out"
        )
    if stated is not None or choices.cosine is not None:
        return bool(choices.cosine if stated is None else stated), ()
    at_length = "at length 1" if is_legacy else "as they are"
    return is_legacy, (
        f"no config says {LENGTH_WORD}, so outputs and codes are compared {at_length}, as in the published models of this layout; "
        f"quantizer.cosine={str(not is_legacy).lower()} is the other reading",
    )


def describe_ends(
    file: PublicFile, is_legacy: bool
) -> tuple[type[TiTokDecoder] | type[TiTokCodeDecoder], dict[str, Any]]:
    """The class of the decoder, and its settings for what follows the transformer."""
    if not is_legacy:
        return TiTokDecoder, {"colours": int(require(file, "decoder.conv_out.weight", 4).shape[1])}
    pixel_codes, pixel_dim = require(file, PIXEL_CODEBOOK).shape
    levels = 0
    while f"{PIXEL_NETWORK}.up.{levels}.block.0.conv1.weight" in file.tensors:
        levels += 1
    sizes = SizeReader(file, PIXEL_STYLE).read_side("decoder", levels)
    width = sizes.widths[0]
    if any(each % width for each in sizes.widths):
        raise InputError(
            f"{file.source} has levels of {', '.join(map(str, sizes.widths))} channels in its {PIXEL_NETWORK}, and all must be "
            f"multiples of {width}, those of the first; the file is of another kind than its names say"
        )
    return TiTokCodeDecoder, {
        "pixel_codes": int(pixel_codes),
        "pixel_dim": int(pixel_dim),
        "pixel_width": width,
        "pixel_mults": [each // width for each in sizes.widths],
        "pixel_depth": sizes.blocks,
    }


def name_pixel_layer(place: Place) -> str:
    """The names of MaskGIT's decoder inside a TiTok."""
    return MASKGIT_STYLE.name_layer(place).replace("decoder.", f"{PIXEL_NETWORK}.", 1)


PIXEL_STYLE = NameStyle(name_pixel_layer, MASKGIT_STYLE.parts)


def name_titok(depth: int, decoder: BaseTiTokDecoder) -> dict[str, str]:
    """This project's names of the weights of a TiTok, whose encoder has `depth` blocks -> the public names."""
    return {
        **name_transformer("encoder", depth),
        **name_transformer("decoder", decoder.depth),
        "encoder.row": LATENTS,
        "decoder.mask": "decoder.mask_token",
        "quantizer.codebook": CODEBOOK,
        **name_both("encoder.embed", "encoder.patch_embed"),
        **name_both("into", "encoder.conv_out"),
        **name_both("out", "decoder.decoder_embed"),
        **name_ends(decoder),
    }


def full_name(kind: type) -> str:
    """What _target_ calls a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def name_both(own: str, public: str) -> dict[str, str]:
    """The names of a layer's weight and bias."""
    return {f"{own}.{key}": f"{public}.{key}" for key in ("weight", "bias")}


def name_transformer(side: str, depth: int) -> dict[str, str]:
    """The names of the blocks and tokens of one side."""
    names = {
        f"{side}.join.class_token": f"{side}.class_embedding",
        f"{side}.join.positions": f"{side}.positional_embedding",
        f"{side}.join.row_positions": f"{side}.latent_token_positional_embedding",
        **name_both(f"{side}.join.norm", f"{side}.ln_pre"),
        **name_both(f"{side}.layers.{depth}", f"{side}.ln_post"),
    }
    for i in range(depth):
        for own, public in BLOCK_PARTS.items():
            names[f"{side}.layers.{i}.{own}"] = f"{side}.transformer.{i}.{public}"
    return names


def name_ends(decoder: BaseTiTokDecoder) -> dict[str, str]:
    """The names of what follows the transformer of a decoder."""
    first = decoder.depth + 2  # behind the norm and the choice of the patches
    names = name_both(f"decoder.layers.{first}", "decoder.ffn.0")
    if not isinstance(decoder, TiTokCodeDecoder):
        return names | name_both("decoder.last", "decoder.conv_out")
    names |= name_both(f"decoder.layers.{first + 2}", "decoder.ffn.2")
    names[f"decoder.layers.{first + 3}.codes"] = PIXEL_CODEBOOK
    places = enumerate(decoder.pixel_places, first + 4)
    children = list(decoder.layers.children())
    for i, place in places:
        for key in children[i].state_dict():
            names[f"decoder.layers.{i}.{key}"] = PIXEL_STYLE.name_weight(place, key)
    return names | name_both("decoder.last", f"{PIXEL_NETWORK}.conv_out")


def order_ends(decoder: BaseTiTokDecoder) -> dict[str, Callable[[Tensor], Tensor]]:
    """The transforms of the layer before depth to space: its rows are ordered by offset, then colour."""
    if isinstance(decoder, TiTokCodeDecoder):
        return {}
    order = partial(order_as_pixel_shuffle, offsets=decoder.patch**2)
    first = decoder.depth + 2
    return {f"decoder.layers.{first}.{key}": order for key in ("weight", "bias")}
