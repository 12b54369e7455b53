"""MoVQGAN as ai-forever's code saves it: taming's names, and in the decoder normalisations that the codes modulate."""

from codegrid.engine.errors import InputError
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config, read_section
from vqgan.formats.pyramid_names import CODEBOOK, SizeReader, check_images, require
from vqgan.formats.spatial_names import (
    SPATIAL_PARTS,
    SpatialStyle,
    describe_spatial,
    name_spatial,
)
from vqgan.formats.taming import (
    SOFTMAX_PARTS,
    TAMING_WORDS,
    check_latents,
    name_layer,
    refuse_cosine,
)
from vqgan.networks.spatial import SPATIAL_GROUPS


class MoVQGAN(Format):
    """A codebook of which the nearest code is chosen, and which reaches every normalisation of the decoder."""

    title = "MoVQGAN"

    def recognises(self, file: PublicFile) -> bool:
        return file.tensors.keys() >= {
            "encoder.down.0.block.0.conv1.weight",
            "decoder.norm_out.norm_layer.weight",
            CODEBOOK,
        }

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        refuse_cosine(file, choices)
        if "decoder.norm_out.conv.weight" in file.tensors:
            raise InputError(
                f"{file.source} has a 3x3 convolution in each normalisation of its decoder (add_conv), which is not built here"
            )
        style = SpatialStyle(name_layer, SOFTMAX_PARTS, {**SOFTMAX_PARTS, **SPATIAL_PARTS})
        encoder, decoder = SizeReader(file, style).read()
        check_latents(file, encoder)
        check_images(file, choices, (encoder.channels, decoder.channels), encoder.f)
        K, dim = require(file, CODEBOOK).shape
        check_config(file, file.settings, {"n_embed": K, "embed_dim": dim})
        check_config(file, read_section(file.settings, "ddconfig"), encoder.in_words(TAMING_WORDS))
        pixels = choices.pixels or (-1, 1)
        model = describe_spatial(encoder, decoder, choices.image_size, pixels, SPATIAL_GROUPS, dim)
        names = name_spatial(model, style) | {"quantizer.codebook": CODEBOOK}
        return Plan(model, read_quantizer("vq", K=K, dim=dim, kmeans=False), names)
