"""Which parts of a tokenizer learn in a run, and which rest."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from engine.errors import InputError
from vqgan.tokenizer import Tokenizer


@dataclass(frozen=True)
class Learners:
    """The parts of a tokenizer that learn. The others rest: their weights and buffers stay the same to the bit.

    encoder    with the layers that lead from it to the codes
    codes      the quantizer
    decoder    with the layers that lead from the codes to it
    """

    encoder: bool
    codes: bool
    decoder: bool

    @property
    def any(self) -> bool:
        """Whether anything of the tokenizer learns."""
        return self.encoder or self.codes or self.decoder

    def rest(self, tokenizer: Tokenizer) -> None:
        """Take the gradients of all parts that rest away."""
        for part in self.resting_parts(tokenizer):
            part.requires_grad_(False)

    def resting_parts(self, tokenizer: Tokenizer) -> Iterator[nn.Module]:
        """The modules of a tokenizer that rest."""
        patches = tokenizer.patches
        if not self.encoder:
            yield from (tokenizer.encoder, tokenizer.into)
            yield from [] if patches is None else [patches.into]
        if not self.codes:
            yield tokenizer.quantizer
        if not self.decoder:
            yield from (tokenizer.decoder, tokenizer.out)
            yield from [] if patches is None else [patches.out]

    def stop_noise(self, tokenizer: Tokenizer) -> None:
        """Put what rests into evaluation mode: batch statistics stay, and the decoder learns from the codes that a later
        stage will choose. A continuous bottleneck keeps its noise, which is part of what its decoder has to learn."""
        for part in self.resting_parts(tokenizer):
            if part is not tokenizer.quantizer or tokenizer.K is not None:
                part.eval()


ALL = Learners(encoder=True, codes=True, decoder=True)
LEARNERS = {
    "all": ALL,
    "decoder": Learners(encoder=False, codes=False, decoder=True),
    "decoder_and_codes": Learners(encoder=False, codes=True, decoder=True),
    "discriminator": Learners(encoder=False, codes=False, decoder=False),
}


def choose_learners(learn: object, starts_trained: bool, has_discriminator: bool) -> Learners:
    """The parts that the setting `learn` names. Raises InputError if there is no such choice, or nothing to learn or to rest."""
    if learn not in LEARNERS:
        raise InputError(f"learn={learn} must be one of {', '.join(LEARNERS)}")
    learners = LEARNERS[str(learn)]
    if not learners.encoder and not starts_trained:
        raise InputError(
            f"learn={learn} leaves the encoder as it starts, so it needs one that is trained; "
            "add init=<run folder of stage=vqgan>, or use learn=all"
        )
    if not learners.any and not has_discriminator:
        raise InputError(
            f"learn={learn} needs a loss that has a discriminator; use loss=vqgan, or learn=decoder"
        )
    return learners
