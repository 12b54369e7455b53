"""Which parts of a tokenizer learn in a run, and which rest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int
from vqgan.lora import add_low_rank, count_plain
from vqgan.tokenizer import Tokenizer


@dataclass(frozen=True)
class Learners:
    """The parts of a tokenizer that learn. The others rest: their weights and buffers stay the same to the bit.

    encoder    with the layers that lead from it to the codes
    codes      the quantizer
    decoder    with the layers that lead from the codes to it
    rank       of the low-rank updates that are all that learns of encoder and decoder; None: all of their weights learn
    """

    encoder: bool
    codes: bool
    decoder: bool
    rank: int | None = None

    @property
    def any(self) -> bool:
        """Whether anything of the tokenizer learns."""
        return self.encoder or self.codes or self.decoder

    def rest(self, tokenizer: Tokenizer) -> None:
        """Take the gradients of all parts that rest away."""
        for part in self.resting_parts(tokenizer):
            part.requires_grad_(False)

    def adapt(self, tokenizer: Tokenizer) -> None:
        """Give what learns of the networks low-rank updates, if those are chosen: once, when the weights are set."""
        if self.rank is None:
            return
        networks = [part for learns, part in self.list_networks(tokenizer) if learns]
        add_low_rank(networks, self.rank)
        learning = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
        log_line(
            f"lora={self.rank}: {learning:,} parameters learn, beside {count_plain(tokenizer):,} of the tokenizer"
        )

    def list_networks(self, tokenizer: Tokenizer) -> Iterator[tuple[bool, nn.Module]]:
        """All modules of a tokenizer but the quantizer, and whether they learn."""
        patches = tokenizer.patches
        yield from ((self.encoder, part) for part in (tokenizer.encoder, tokenizer.into))
        yield from ((self.decoder, part) for part in (tokenizer.decoder, tokenizer.out))
        if patches is not None:
            yield from ((self.encoder, patches.into), (self.decoder, patches.out))

    def resting_parts(self, tokenizer: Tokenizer) -> Iterator[nn.Module]:
        """The modules of a tokenizer that rest. Beside low-rank updates, these are also the layers that count something."""
        if not self.codes:
            yield tokenizer.quantizer
        for learns, network in self.list_networks(tokenizer):
            if not learns:
                yield network
            elif self.rank is not None:
                yield from (part for part in network.modules() if [*part.buffers(recurse=False)])

    def stop_noise(self, tokenizer: Tokenizer) -> None:
        """Put what rests into evaluation mode: batch statistics stay, and the decoder learns from the codes that a later
        stage will choose. A continuous bottleneck keeps its noise, which is part of what its decoder has to learn, and one
        behind an encoder that learns keeps what the encoder's gradient comes through. Nested codes that rest are
        still cut for a decoder that learns, or it would forget how to decode the first ones alone."""
        quantizer = tokenizer.quantizer
        for part in self.resting_parts(tokenizer):
            if part is not quantizer or (tokenizer.K is not None and not self.encoder):
                part.eval()
        if self.decoder and quantizer.nested:
            quantizer.training = True  # its codebooks rest


ALL = Learners(encoder=True, codes=True, decoder=True)
LEARNERS = {
    "all": ALL,
    "decoder": Learners(encoder=False, codes=False, decoder=True),
    "decoder_and_codes": Learners(encoder=False, codes=True, decoder=True),
    "discriminator": Learners(encoder=False, codes=False, decoder=False),
}


def choose_learners(
    learn: object, starts_trained: bool, has_discriminator: bool, lora: object = None
) -> Learners:
    """The parts that the setting `learn` names, with updates of rank `lora` unless that is None.

    Raises InputError if there is no such choice, or nothing to learn or to rest.
    """
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
    return learners if lora is None else restrict_rank(learners, learn, lora, starts_trained)


def restrict_rank(learners: Learners, learn: object, lora: Any, starts_trained: bool) -> Learners:
    """These parts with updates of rank `lora`: codes learn beside them only where `learn` names them."""
    check_int("lora", lora, 1)
    if not starts_trained:
        raise InputError(
            f"lora={lora} updates weights that are trained, so it needs some; "
            "add init=<run folder of stage=vqgan>, or use lora=null"
        )
    if not learners.any:
        raise InputError(
            f"lora={lora} updates encoder and decoder, and learn={learn} leaves both as they are; "
            "use learn=all or learn=decoder, or lora=null"
        )
    return replace(learners, codes=learn == "decoder_and_codes", rank=lora)
