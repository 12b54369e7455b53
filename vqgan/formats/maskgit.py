"""MaskGIT's VQGAN, as open-muse and 1d-tokenizer have it."""

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.pyramid_names import CODEBOOK, NameStyle, require
from vqgan.formats.unbiased_names import describe_unbiased, place_namer
from vqgan.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder

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
        networks = MaskGITEncoder, MaskGITDecoder
        pixels = choices.pixels or (0, 1)
        model, names = describe_unbiased(file, choices, MASKGIT_STYLE, networks, pixels)
        K, dim = require(file, CODEBOOK).shape
        quantizer = read_quantizer("vq", K=K, dim=dim, kmeans=False, cosine=bool(choices.cosine))
        return Plan(model, quantizer, {**names, "quantizer.codebook": CODEBOOK})
