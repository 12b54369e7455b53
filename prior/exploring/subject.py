"""What is explored: a tokenizer with its images, and a prior where `ckpt` is one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.shown import choose_shown
from codegrid.engine.checkpoint import find_checkpoint, read_checkpoint
from codegrid.engine.errors import InputError
from prior.export.graphs import describe_graph
from prior.load import load_prior, refuse_decoder
from prior.models.base import PriorModel
from prior.prior import Prior
from vqgan.load import load_images, load_tokenizer, require_codes
from vqgan.tokenizer import Tokenizer

HALF = 2  # bytes of a weight in float16
BASE64 = 4 / 3
RUNTIME_BYTES = 5e6  # of a page


@dataclass(frozen=True)
class Subject:
    """A tokenizer, its images, and the prior on its codes, if there is one.

    name     of the run folder of `ckpt`
    run_id   of that run
    stage    vqgan or prior
    """

    tokenizer: Tokenizer
    images: ImageDataModule
    prior: Prior | None
    name: str
    run_id: str | None

    @property
    def stage(self) -> str:
        return "vqgan" if self.prior is None else "prior"

    @property
    def shown(self) -> list[int]:
        """The channels that pictures show, counted from 0."""
        channels = self.tokenizer.encoder.channels
        return [number - 1 for number in choose_shown(channels, self.tokenizer.rules.show)]

    @property
    def refusal(self) -> str | None:
        """Why a picture of 8 bits can't be encoded, a sentence; None if it can."""
        channels = self.tokenizer.encoder.channels
        if not self.tokenizer.rules.is_plain:
            return "This model reads values in units of its data, which a picture of 8 bits does not have."
        if self.shown != list(range(channels)):
            return (
                f"This model reads {channels} channels, of which a picture shows {len(self.shown)}."
            )
        return None

    def refuse_prior(self, is_served: bool) -> str | None:
        """Why the page can't have the prior, a sentence; None if it can, or if there is none. A server needs no graph of it."""
        if self.prior is None:
            return None
        if self.prior.condition is not None and not self.prior.condition.is_exportable:
            return "The prior reads the codes of another image in front of its own, which this page has no place for."
        if not is_served and not has_graph(self.prior.model):
            kind = type(self.prior.model).__name__
            return f"The prior, {kind}, has no network that predicts code by code or fills in masked codes."
        return None


def has_graph(model: PriorModel) -> bool:
    """Whether stage=export could write a prior as a graph."""
    try:
        describe_graph(model)
    except InputError:
        return False
    return True


def open_subject(ckpt: str, decoder: str | None, places: Mapping[str, Any]) -> Subject:
    """The run that `ckpt` names, with its images in these places.

    Raises InputError for a continuous tokenizer, and for what can't be read.
    """
    header = read_checkpoint(ckpt, "vqgan", "prior")["codegrid"]
    name = find_checkpoint(ckpt).parent.parent.resolve().name
    if header["stage"] == "prior":
        trained = load_prior(ckpt, decoder)
        tokenizer, data = trained.tokenizer, trained.data
    else:
        refuse_decoder(ckpt, decoder)
        tokenizer, described = load_tokenizer(ckpt)
        require_codes(tokenizer, f"ckpt={ckpt} is continuous and has no codes to explore")
        trained, data = None, described["data"]
    images = load_images(data, places, ckpt)
    return Subject(tokenizer, images, trained, name, header["config"].get("id"))


def check_page_size(subject: Subject, most: int) -> None:
    """Raise InputError if the page of this model would have more than so many megabytes by its weights in float16 alone."""
    modules: list[nn.Module] = [subject.tokenizer]
    if subject.prior is not None and subject.refuse_prior(is_served=False) is None:
        modules.append(subject.prior.model)
    weights = sum(p.numel() for module in modules for p in module.parameters())
    megabytes = round((weights * HALF * BASE64 + RUNTIME_BYTES) / 1e6)
    if megabytes > most:
        raise InputError(
            f"the page would have about {megabytes:,} megabytes, and max_megabytes={most} are allowed; add serve=true, which keeps "
            "the model out of the page, explore a smaller one (stage=distill makes a small decoder), or raise max_megabytes"
        )
