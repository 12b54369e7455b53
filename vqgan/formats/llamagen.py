"""LlamaGen's VQ-8 and VQ-16: taming's networks under other names, and codes that are compared by their direction."""

from codegrid.engine.errors import InputError
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
from vqgan.formats.taming import SOFTMAX_PARTS, check_latents
from vqgan.networks.pyramid import Place

USE_COUNTS = "quantize.codebook_used"  # which codes the last batches of training used
LENGTH_SETTING = "codebook_l2_norm"


def name_llamagen_layer(place: Place) -> str:
    """The name of a layer; levels are counted in the order in which they run."""
    ends = {"entry": "conv_in", "norm": "norm_out", "exit": "conv_out"}
    if place.kind in ends:
        return f"{place.side}.{ends[place.kind]}"
    if place.is_middle:
        return f"{place.side}.mid.{1 if place.kind == 'attention' else 2 * place.number}"
    level = f"{place.side}.conv_blocks.{place.step}"
    if place.kind == "resample":
        return f"{level}.{'downsample' if place.side == 'encoder' else 'upsample'}.conv"
    return f"{level}.{'res' if place.kind == 'block' else 'attn'}.{place.number}"


class LlamaGen(Format):
    """A codebook of which the code with the smallest angle is chosen."""

    title = "LlamaGen's VQ-8 and VQ-16"

    def recognises(self, file: PublicFile) -> bool:
        return file.tensors.keys() >= {
            "encoder.conv_blocks.0.res.0.conv1.weight",
            "decoder.conv_blocks.0.res.0.conv1.weight",
            CODEBOOK,
        }

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        style = NameStyle(name_llamagen_layer, SOFTMAX_PARTS)
        encoder, decoder = SizeReader(file, style).read()
        check_latents(file, encoder)
        check_images(file, choices, (encoder.channels, decoder.channels), encoder.f)
        K, dim = require(file, CODEBOOK).shape
        sizes = {
            "codebook_size": K,
            "codebook_embed_dim": dim,
            "z_channels": encoder.z_channels,
            "encoder_ch_mult": encoder.mults,
            "decoder_ch_mult": decoder.mults,
        }
        check_config(file, file.settings, sizes)
        cosine, remarks = choose_cosine(file, choices)
        pixels = choices.pixels or (-1, 1)
        model = describe_pyramid(encoder, decoder, choices.image_size, pixels)
        names = name_pyramid(model, style) | {"quantizer.codebook": CODEBOOK}
        return Plan(
            model,
            read_quantizer("vq", K=K, dim=dim, cosine=cosine, kmeans=False),
            names,
            statistics=frozenset({USE_COUNTS} & file.tensors.keys()),
            remarks=remarks,
        )


def choose_cosine(file: PublicFile, choices: Choices) -> tuple[bool, tuple[str, ...]]:
    """Whether outputs and codes are scaled to length 1, and what was assumed where neither config nor command says it.

    Raises InputError if both say it and differ.
    """
    own = file.settings.get(LENGTH_SETTING)
    if own is None and choices.cosine is None:
        return True, (
            f"no config says {LENGTH_SETTING}, so outputs and codes are scaled to length 1, as LlamaGen's training script always "
            "does; quantizer.cosine=false is the other reading",
        )
    if own is not None and choices.cosine not in (None, bool(own)):
        raise InputError(
            f"quantizer.cosine={str(choices.cosine).lower()} contradicts {LENGTH_SETTING}={str(own).lower()} in the config of "
            f"{file.source}; leave out quantizer.cosine"
        )
    return bool(own if choices.cosine is None else choices.cosine), ()
