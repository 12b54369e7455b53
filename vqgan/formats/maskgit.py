"""MaskGIT's VQGAN, as open-muse and 1d-tokenizer have it."""

from codegrid.engine.errors import InputError
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.open_muse import MUSE_WORDS
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config
from vqgan.formats.pyramid_names import CODEBOOK, NameStyle, require
from vqgan.formats.taming import refuse_cosine
from vqgan.formats.unbiased_names import describe_unbiased, place_namer
from vqgan.networks.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder

MASKGIT_STYLE = NameStyle(
    place_namer("mid", {"encoder": "downsample", "decoder": "upsample_conv"}),
    {"shortcut": "nin_shortcut"},
)


class MaskGITVQGAN(Format):
    """A codebook right between two networks without attention; images are in [0, 1]."""

    title = "MaskGIT's VQGAN (open-muse, 1d-tokenizer)"

    def recognises(self, file: PublicFile) -> bool:
        return file.tensors.keys() >= {
            "encoder.down.0.block.0.conv1.weight",
            "encoder.mid.0.conv1.weight",
            "decoder.mid.0.conv1.weight",
            CODEBOOK,
        } and not any(name.startswith("quant_conv.") for name in file.tensors)

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        refuse_cosine(file, choices)
        K, dim = require(file, CODEBOOK).shape
        check_config(file, file.settings, {"num_embeddings": K, "quantized_embed_dim": dim})
        model, names = describe_unbiased(
            file,
            choices,
            MASKGIT_STYLE,
            networks=(MaskGITEncoder, MaskGITDecoder),
            pixels=choices.pixels or (0, 1),
            config=file.settings,
            words=MUSE_WORDS,
        )
        if model["z_channels"] != dim:
            raise InputError(
                f"{file.source} has codes of {dim} numbers and an encoder that gives {model['z_channels']}, with no "
                "convolution between them; the file is incomplete"
            )
        quantizer = read_quantizer("vq", K=K, dim=dim, kmeans=False)
        return Plan(model, quantizer, {**names, "quantizer.codebook": CODEBOOK})
