"""open-muse's VQGANModel: taming's networks and names, images in [0, 1]."""

from dataclasses import replace

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config
from vqgan.formats.pyramid_names import CODEBOOK, describe_pyramid, require
from vqgan.formats.taming import (
    has_taming_names,
    is_muse,
    name_taming,
    read_taming,
    refuse_cosine,
)

MUSE_WORDS = {
    "num_channels": "channels",
    "hidden_channels": "width",
    "channel_mult": "mults",
    "num_res_blocks": "blocks",
    "z_channels": "z_channels",
}


class OpenMuseVQ(Format):
    """A codebook of which the nearest code is chosen."""

    title = "open-muse's VQGANModel"

    def recognises(self, file: PublicFile) -> bool:
        return has_taming_names(file) and CODEBOOK in file.tensors and is_muse(file)

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        refuse_cosine(file, choices)
        K, dim = require(file, CODEBOOK).shape
        encoder, decoder, options = read_taming(file, choices)
        sizes = {**encoder.in_words(MUSE_WORDS), "num_embeddings": K, "quantized_embed_dim": dim}
        check_config(file, file.settings, sizes)
        unused = frozenset[str]()
        if encoder.blocks == 1:
            # Its code attends only in levels of more than one block, but saves the weights in any case.
            unused = frozenset(name for name in file.tensors if is_level_attention(name))
            encoder = replace(encoder, attention=())
        pixels = choices.pixels or (0, 1)
        model = describe_pyramid(encoder, decoder, choices.image_size, pixels, **options)
        quantizer = read_quantizer("vq", K=K, dim=dim, kmeans=False)
        names = name_taming(model) | {"quantizer.codebook": CODEBOOK}
        return Plan(model, quantizer, names, statistics=unused)


def is_level_attention(name: str) -> bool:
    """Whether a weight belongs to the attention of a level of the encoder."""
    return name.startswith("encoder.down.") and ".attn." in name
