"""Open-MAGVIT2's tokenizers of images."""

from collections.abc import Callable

from torch import Tensor

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import check_config
from vqgan.formats.pyramid_names import NameStyle
from vqgan.formats.taming import TAMING_WORDS, read_networks, refuse_cosine
from vqgan.formats.unbiased_names import describe_unbiased, place_namer
from vqgan.networks.open_magvit2 import MAGVIT2Decoder, MAGVIT2Encoder

MAGVIT2_STYLE = NameStyle(
    place_namer("mid_block", {"encoder": "downsample", "decoder": "upsample"}),
    {"shortcut": "nin_shortcut", "0": "conv1"},
)


class OpenMAGVIT2(Format):
    """Signs of the encoder's channels, with no weights of their own."""

    title = "Open-MAGVIT2's VQModel"

    def recognises(self, file: PublicFile) -> bool:
        return file.tensors.keys() >= {
            "encoder.down.0.block.0.conv1.weight",
            "encoder.mid_block.0.conv1.weight",
            "decoder.adaptive.0.gamma.weight",
        }

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        refuse_cosine(file, choices)
        model, names = describe_unbiased(
            file,
            choices,
            MAGVIT2_STYLE,
            networks=(MAGVIT2Encoder, MAGVIT2Decoder),
            pixels=choices.pixels or (-1, 1),
            config=read_networks(file),
            words=TAMING_WORDS,
        )
        bits = model["z_channels"]
        check_config(file, file.settings, {"n_embed": 2**bits, "embed_dim": bits})
        transforms: dict[str, Callable[[Tensor], Tensor]] = {
            ours: order_as_pixel_shuffle for ours, name in names.items() if ".upsample." in name
        }
        return Plan(model, read_quantizer("lfq", K=2**bits), names, transforms)


def order_as_pixel_shuffle(rows: Tensor, offsets: int = 4) -> Tensor:
    """Rows of a convolution before depth to space, from the order (dy, dx, channel) to torch's (channel, dy, dx), where each pixel
    becomes so many."""
    return rows.unflatten(0, (offsets, -1)).transpose(0, 1).flatten(0, 1)
