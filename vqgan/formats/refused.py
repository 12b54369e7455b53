"""Files of other programs that are recognised and can't become a tokenizer of this one: one sentence each."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from codegrid.engine.errors import InputError
from vqgan.formats.base import PublicFile

NUMBERED_ATTENTION = re.compile(r"\.\d+\..*att(n|ention)")


@dataclass(frozen=True)
class Refusal:
    """One kind of file, and why it stays outside: `reason` continues a sentence that begins with the file."""

    matches: Callable[[PublicFile], bool]
    reason: str


def is_titok(file: PublicFile) -> bool:
    """TiTok's and its successors': tokens that attend to patches."""
    return file.tensors.keys() >= {"latent_tokens", "encoder.patch_embed.weight"}


def is_guided_titok(file: PublicFile) -> bool:
    """TA-TiTok's, whose decoder reads a text too."""
    return is_titok(file) and any(".text_guidance_" in name for name in file.tensors)


def is_continuous_titok(file: PublicFile) -> bool:
    """A TiTok with means and variances in place of codes."""
    return is_titok(file) and not any(name.startswith("quantize.") for name in file.tensors)


def is_first_titok(file: PublicFile) -> bool:
    """A TiTok after the first of its two stages of training, which gives a VQGAN's codes and lacks that VQGAN."""
    has_logits = "decoder.ffn.2.weight" in file.tensors
    return is_titok(file) and has_logits and "pixel_decoder.conv_in.weight" not in file.tensors


def is_continuous(file: PublicFile) -> bool:
    """AutoencoderKL's: no codebook, and an encoder that gives two numbers where the decoder takes one."""
    ends = "encoder.conv_out.weight", "decoder.conv_in.weight"
    if any("quantize." in name for name in file.tensors) or not file.tensors.keys() >= {*ends}:
        return False
    out, into = (file.tensors[name].shape for name in ends)
    return out[0] == 2 * into[1]


def is_generator(file: PublicFile) -> bool:
    """A transformer's or a U-Net's, without the tokenizer beside it."""
    sides = {name.partition(".")[0] for name in file.tensors} & {"encoder", "decoder"}
    return len(sides) < 2 and any(map(NUMBERED_ATTENTION.search, file.tensors))


REFUSALS = (
    Refusal(
        is_guided_titok,
        "is TA-TiTok, whose decoder reads a text beside the codes, and a tokenizer here decodes codes alone; "
        "import a TiTok (tokenizer_titok_l32, _b64, _s128, _bl64_vq8k ...), which does",
    ),
    Refusal(
        is_continuous_titok,
        "is a TiTok with means and variances in place of codes, and only tokenizers with codes can be imported; "
        "import one whose name has no vae in it",
    ),
    Refusal(
        is_first_titok,
        "is a TiTok of the first stage of its training, which gives the codes of a VQGAN and lacks that VQGAN's decoder; "
        "import the one of the second stage, which has pixel_decoder",
    ),
    Refusal(
        is_continuous,
        "is a continuous autoencoder such as AutoencoderKL, which has no codebook, and only tokenizers with codes can be "
        "imported; take one with a codebook (vq-f4, vq-f8 or vq-f16 among those of latent diffusion)",
    ),
    Refusal(
        is_generator,
        "has a transformer or a U-Net and no tokenizer beside it; name the file of the tokenizer whose codes or features it makes",
    ),
)


def refuse_known(file: PublicFile) -> None:
    """Raise InputError with what the file is, if it is of a kind that can't become a tokenizer of this program."""
    for refusal in REFUSALS:
        if refusal.matches(file):
            raise InputError(f"{file.source} {refusal.reason}")
