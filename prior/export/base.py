"""The contract of a prior's exports: what one format writes beside the tokenizer, and how it is checked."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from prior.prior import Prior


class PriorFormat(ABC):
    """One format of a prior, which has the name of the tokenizer's."""

    name: str

    @abstractmethod
    def check(self, trained: Prior) -> None:
        """Raise InputError if the prior or this machine does not allow this format."""

    @abstractmethod
    def encode_files(self, trained: Prior) -> dict[str, bytes]:
        """The content of each file, by its path in the folder."""

    @abstractmethod
    def verify(self, trained: Prior, folder: Path) -> dict[str, Any]:
        """Read the files back and compare them with the prior; figures of the comparison. Raises InputError if they differ."""

    @abstractmethod
    def describe_use(self, trained: Prior) -> str:
        """How it is read, as lines of Markdown for the model card."""
