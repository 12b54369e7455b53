"""Weights on the Hugging Face hub, by the ids of their repositories."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from codegrid.engine.errors import InputError, summarize_error

Answer = TypeVar("Answer")

HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(/(?P<inner>.+))?$")


class HubFolder:
    """A repository at its newest commit; a file is downloaded when it is asked for, once."""

    is_remote = True

    def __init__(self, repository: str) -> None:
        try:
            import huggingface_hub
        except ImportError as error:
            raise InputError(
                f"from={repository} is no file or folder here, and a hub id needs the library huggingface_hub; "
                'pip install "codegrid[hf]"'
            ) from error
        self._hub: Any = huggingface_hub
        self.repository = repository
        info = self._ask(lambda: self._hub.HfApi().model_info(repository))
        self.commit = str(info.sha)
        self.names = sorted(str(file.rfilename) for file in info.siblings or ())

    def fetch(self, name: str) -> Path:
        file = self._ask(
            lambda: self._hub.hf_hub_download(self.repository, name, revision=self.commit)
        )
        return Path(file)

    def address(self, name: str) -> str:
        return f"{self.repository}/{name}"

    def cite(self, name: str) -> str:
        return f"hub:{self.repository}/{name}@{self.commit}"

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except Exception as error:  # the library and its network layer have many kinds
            raise InputError(
                f"from={self.repository} is no file or folder here, and the hub does not give it ({summarize_error(error)}); "
                "without a network, give the path of a copy"
            ) from error
