"""The contract of conditions: what a prior is conditioned on, for a model, a command and a file."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.decoding.sampling import Sampler
from prior.models.base import PriorModel

MAX_SHOWN = 60  # characters of a value in a sentence
NO_CONDITION = "none"  # condition=none: samples of no condition, as label=-1


class Condition(ABC):
    """What a prior is conditioned on. A label is what it reads of it for one image (see PriorModel)."""

    is_exportable = True  # whether a prior and its tokenizer are all that is needed to draw samples

    @abstractmethod
    def attach(self, model: PriorModel) -> None:
        """Let a model that was just built take labels of this kind. Raises InputError for one that can't."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of it, in types that JSON can write."""

    @abstractmethod
    def summarize(self) -> str:
        """What it is, in a sentence: vectors of 5 numbers."""

    @abstractmethod
    def read(self, value: Any) -> Tensor:
        """The labels (m, ...) that a command or a script gives, in any form that it may give them in. Raises InputError."""

    def show(self, labels: Tensor, size: Sequence[int]) -> Tensor | None:
        """Pictures (n, 3 or 1, *size) uint8 of labels (n, ...), if they are pictures."""
        return None

    def to(self, device: torch.device | str) -> None:
        """Move networks to a device, in place."""
        return

    def choose(self, model: PriorModel, value: Any, n: int, in_turn: bool = True) -> Tensor:
        """The labels (n, ...) of n samples or images: those that `value` gives, in turn, or else one for all or n.

        Raises InputError for values that are none.
        """
        if value is None:
            raise InputError(
                f"this prior is conditioned on {self.summarize()}; give condition=..., or condition={NO_CONDITION} for samples "
                "of no condition"
            )
        if isinstance(value, str) and value == NO_CONDITION:
            blank = model.blank_labels(n)
            assert blank is not None
            return blank
        labels = self.read(value)
        if not len(labels):
            raise InputError("condition is an empty list; give at least one, or leave it out")
        if not in_turn and len(labels) not in (1, n):
            raise InputError(
                f"condition has {len(labels)} for {n} images; give one for all, or one for each"
            )
        return labels[torch.arange(n) % len(labels)]


def check_guidance(sampler: Sampler, model: PriorModel) -> None:
    """Raise InputError if samples are guided by a condition that the prior doesn't have."""
    if sampler.guidance != 1 and not model.is_conditional:
        raise InputError(
            f"sampler.guidance={sampler.guidance} needs a prior of classes, or of another condition; train one with "
            "conditional=true"
        )


def shorten_value(value: Any) -> str:
    """A value in a sentence, cut off if it is long."""
    text = " ".join(str(value).split())
    return f"{text[:MAX_SHOWN]}..." if len(text) > MAX_SHOWN else text


def is_file(value: Any, suffixes: Sequence[str] = ()) -> bool:
    """Whether a setting is the name of a file, with one of these endings if there are any."""
    if not isinstance(value, str | Path):
        return False
    return not suffixes or Path(value).suffix.lower() in suffixes
