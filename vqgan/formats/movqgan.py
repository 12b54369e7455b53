"""MoVQGAN as ai-forever's code saves it: taming's names, and in the decoder normalisations that the codes modulate."""

from engine.errors import InputError
from vqgan.formats.agreement import check_agreement, refuse_cosine
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.pyramid_names import CODEBOOK, SizeReader, check_images, require
from vqgan.formats.spatial_names import (
    SPATIAL_PARTS,
    SpatialStyle,
    describe_spatial,
    name_spatial,
)
from vqgan.formats.taming import SOFTMAX_PARTS, name_layer
from vqgan.spatial import SPATIAL_GROUPS


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
        refuse_cosine(file, choices, self.title)
        if "decoder.norm_out.conv.weight" in file.tensors:
            raise InputError(
                f"{file.source} has a 3x3 convolution in each normalisation of its decoder (add_conv), which is not built here"
            )
        style = SpatialStyle(name_layer, SOFTMAX_PARTS, {**SOFTMAX_PARTS, **SPATIAL_PARTS})
        encoder, decoder = SizeReader(file, style).read()
        channels, f = (encoder.channels, decoder.channels), 2 ** (len(encoder.widths) - 1)
        check_images(file, choices, channels, f)
        K, dim = require(file, CODEBOOK).shape
        check_agreement(file, file.settings, {"n_embed": K, "embed_dim": dim})
        sizes = {
            "ch": encoder.width,
            "ch_mult": [width / encoder.width for width in encoder.widths],
            "num_res_blocks": encoder.blocks,
            "z_channels": encoder.z_channels,
        }
        check_agreement(file, file.settings.get("ddconfig", {}), sizes)
        pixels = choices.pixels or (-1, 1)
        model = describe_spatial(encoder, decoder, choices.image_size, pixels, SPATIAL_GROUPS, dim)
        names = name_spatial(model, style) | {"quantizer.codebook": CODEBOOK}
        return Plan(model, read_quantizer("vq", K=K, dim=dim, kmeans=False), names)
