"""format=titok: a folder that 1d-tokenizer's TiTok loads, for the networks that it has."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.export.base import Example, Exporter, to_json
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.formats.open_magvit2 import order_as_pixel_shuffle
from vqgan.formats.titok import HEAD_WIDTH, HEAD_WORD, LENGTH_WORD, name_titok, order_ends
from vqgan.networks.titok import BaseTiTokDecoder, TiTokCodeDecoder, TiTokEncoder
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.ibq import IBQ
from vqgan.tokenizer import Tokenizer

TITOK_FOLDER = "titok"
TITOK_WEIGHTS = f"{TITOK_FOLDER}/model.safetensors"
PUBLISHED_SIZES = {(512, 8): "small", (768, 12): "base", (1024, 24): "large"}  # width, depth


class TiTokExporter(Exporter):
    name = "titok"
    is_read_back = True
    usage = """\
`titok/` is a model of 1d-tokenizer (bytedance/1d-tokenizer), if its transformers have the sizes small, base or large:

```python
from modeling.titok import TiTok

model = TiTok.from_pretrained("titok")
tokens = model.encode(images)[1]["min_encoding_indices"]   # float32 (B, 3, H, W) in [0, 1] -> (B, 1, n)
pictures = model.decode_tokens(tokens)
```"""

    def check(self, tokenizer: Tokenizer) -> None:
        if misfit := find_titok_misfit(tokenizer):
            raise InputError(
                f"format=titok writes 1d-tokenizer's TiTok, and {misfit}; leave titok out of format"
            )

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        return {
            TITOK_WEIGHTS: save(name_titok_tensors(tokenizer), {"format": "pt"}),
            f"{TITOK_FOLDER}/config.json": to_json(describe_titok(tokenizer)),
        }

    @torch.no_grad()
    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        """By this program's import, whose codes and pictures have to be the same to the bit."""
        contents = open_public(str(folder / TITOK_WEIGHTS), None, None)
        again = load_titok(contents.file, tokenizer)
        for each in examples:
            same_codes = torch.equal(again.indices(each.images), each.indices)
            if not (same_codes and torch.equal(again.decode_indices(each.chosen), each.decoded)):
                raise InputError(
                    "format=titok was written and imported again, and its codes or pictures are not the tokenizer's; "
                    "leave titok out of format"
                )
        return {"imported_again": "the same to the bit"}


def load_titok(file: PublicFile, tokenizer: Tokenizer) -> Tokenizer:
    """A file as a tokenizer for the images of another."""
    choices = Choices(tokenizer.encoder.image_size, tokenizer.encoder.channels)
    return load_public(file, choices).tokenizer


def find_titok_misfit(tokenizer: Tokenizer) -> str | None:
    """What TiTok has no place for, as a clause; None for a tokenizer that it can hold."""
    encoder, decoder, quantizer = tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer
    if not isinstance(encoder, TiTokEncoder) or not isinstance(decoder, BaseTiTokDecoder):
        kinds = f"{type(encoder).__name__} and {type(decoder).__name__}"
        return f"its networks are those of an imported TiTok, which {kinds} are not"
    if not isinstance(quantizer, Codebook):
        return f"it chooses the nearest of its codes, which {type(quantizer).__name__} does not"
    if isinstance(quantizer, IBQ) and quantizer.score != "nearest":
        return f"it chooses the nearest of its codes, not by quantizer.score={quantizer.score}"
    if len({encoder.out_channels // encoder.heads, decoder.in_channels // decoder.heads}) > 1:
        return "the attention heads of both its transformers have one width"
    if encoder.channels != 3:
        return f"its images have 3 channels, not {encoder.channels}"
    if tokenizer.pixels != (0, 1):
        return "its images are in [0, 1], those of these networks in [-1, 1]"
    return None


def name_titok_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights by the names of 1d-tokenizer, and in its shapes and order."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    assert isinstance(encoder, TiTokEncoder)
    assert isinstance(decoder, BaseTiTokDecoder)
    assert isinstance(tokenizer.quantizer, Codebook)
    codes = {"quantizer.codebook": tokenizer.quantizer.codes().detach()}
    state = codes | tokenizer.state_dict()  # a table of codes as it is, of any length
    orders = order_ends(decoder)
    colours = (
        decoder.last.in_channels
    )  # of the map before depth to space, in the layout that has one
    undo = partial(order_as_pixel_shuffle, offsets=colours)
    names = name_titok(encoder.depth, decoder)
    tensors = {}
    for own, public in names.items():
        value = undo(state[own]) if own in orders else state[own]
        tensors[public] = reshape_for(public, value).contiguous().clone()
    return tensors


def reshape_for(public: str, value: Tensor) -> Tensor:
    """A weight with the axes that 1d-tokenizer gives it."""
    if public == "decoder.mask_token":
        return value
    if public == "decoder.decoder_embed.weight":  # a linear layer
        return value.flatten(1)
    is_token = public.endswith(("latent_tokens", "_embedding"))
    return value.squeeze(0) if is_token else value


def describe_titok(tokenizer: Tokenizer) -> dict[str, Any]:
    """The config of a TiTok, as 1d-tokenizer writes it."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    assert isinstance(encoder, TiTokEncoder)
    assert isinstance(decoder, BaseTiTokDecoder)
    assert isinstance(tokenizer.quantizer, Codebook)
    is_legacy = isinstance(decoder, TiTokCodeDecoder)
    widths = {encoder.out_channels // encoder.heads, decoder.in_channels // decoder.heads}
    model: dict[str, Any] = {
        "codebook_size": tokenizer.K,
        "token_size": tokenizer.dim,
        LENGTH_WORD: tokenizer.quantizer.cosine,
        "commitment_cost": tokenizer.quantizer.beta,
        "vit_enc_model_size": name_size(encoder.out_channels, encoder.depth),
        "vit_dec_model_size": name_size(decoder.in_channels, decoder.depth),
        "vit_enc_patch_size": encoder.f,
        "vit_dec_patch_size": decoder.patch,
        "num_latent_tokens": tokenizer.grid[1],
        "quantize_mode": "vq",
        "finetune_decoder": is_legacy,
        "is_legacy": is_legacy,
    }
    if widths != {HEAD_WIDTH}:
        model[HEAD_WORD] = widths.pop()
    return {
        "model": {"vq_model": model},
        "dataset": {"preprocessing": {"crop_size": encoder.image_size[0]}},
    }


def name_size(width: int, depth: int) -> str:
    """What 1d-tokenizer calls a transformer of this size; its width and depth if it has no name for it."""
    return PUBLISHED_SIZES.get((width, depth), f"{width}x{depth}")
