"""The contract of public formats: what a file of another program looks like, and how it becomes a tokenizer of this one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from codegrid.engine.sizes import Size, SizeSetting


@dataclass(frozen=True)
class PublicFile:
    """A tokenizer's weights as another program saved them.

    source      the file, for messages
    tensors     by the names of its own code, without prefixes such as first_stage_model.; they may lie on the disk and may share
                memory, so they are copied, never written to
    settings    its own config of this tokenizer, plain containers: taming's model.params, diffusers' config.json ...; empty
                without one
    target      the class that its config names, in full (taming.models.vqgan.VQModel, VQModel ...); None without one
    averaged    the names in `tensors` of which the file has averaged weights too, whichever of the two `tensors` holds: some
                programs average more parts than others
    """

    source: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    averaged: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choices:
    """What the command says of a file that its weights can't tell; None where it says nothing.

    image_size    pixels of the rows and columns of the images that it is going to serve
    channels      of these images; None: those of the weights. Others get a new first and last layer, which is no format's concern
    pixels        the range of values that its networks take and give, [-1, 1] or [0, 1]
    cosine        whether outputs and codes are scaled to length 1 before they are compared
    score         which code is chosen, nearest or inner_product, where formats with the same names differ in that
    scales        the sides of the grids of several scales
    head_width    channels of an attention head, where only the names of published sizes say them
    """

    image_size: Size
    channels: int | None
    pixels: tuple[int, int] | None = None
    cosine: bool | None = None
    score: str | None = None
    scales: tuple[SizeSetting, ...] | None = None
    head_width: int | None = None


@dataclass(frozen=True)
class Plan:
    """How a public file becomes a tokenizer.

    model        the `model` group of a run's config: encoder and decoder with _target_, grid, start=random, pixels
    quantizer    its `quantizer` group
    names        this project's name of each weight -> the public name; public names that appear nowhere must be in `statistics`,
                 and of one that appears more than once each place takes a part by a transform
    transforms   by this project's name: public weight -> this project's, where more than the shape differs; where only axes of
                 length 1 differ, none is needed
    statistics   public names that the tokenizer doesn't need: counters of training, colours for showing label maps
    remarks      what was assumed where the file leaves a choice, one sentence each
    """

    model: dict[str, Any]
    quantizer: dict[str, Any]
    names: dict[str, str]
    transforms: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    statistics: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


class Format(ABC):
    """One kind of public tokenizer. A subclass is a file of this package, which is all that it takes to be known.

    title    what a reader calls it: taming-transformers' VQModel
    """

    title: str

    @abstractmethod
    def recognises(self, file: PublicFile) -> bool:
        """Whether the names, shapes and config are of this format; the file's own name counts for nothing."""

    @abstractmethod
    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        """How to build it for images of this size. Raises InputError where the size, the config or the choices don't fit it,
        or where two readings remain."""
