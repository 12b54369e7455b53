"""Weights on the Hugging Face hub, by the ids of their repositories."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, summarize_error

Answer = TypeVar("Answer")

HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(/(?P<inner>.+))?$")
NEWEST = "main"  # the branch that the hub shows
MAX_COMMITS = 10  # in a sentence


class HubFolder:
    """A repository at one commit; a file is downloaded when it is asked for, once.

    `revision` is a branch, a tag or a commit, None for the newest commit. Without a network it is the copy in the library's
    cache. `setting` is what names the repository in this command.
    """

    is_remote = True

    def __init__(self, repository: str, revision: str | None = None, setting: str = "from") -> None:
        self.repository = repository
        self._name = f"{setting}={repository}"
        try:
            import huggingface_hub
        except ImportError as error:
            raise InputError(
                f"{self._name} is no file or folder here, and a hub id needs the library huggingface_hub; "
                'pip install "codegrid[hf]"'
            ) from error
        self._hub: Any = huggingface_hub.HfApi()
        self._copy: Path | None = None
        try:
            info = self._hub.model_info(repository, revision=revision)
        except Exception as error:  # the library and its network layer have many kinds
            self._copy = self._find_copy(huggingface_hub, revision) if is_offline(error) else None
            if self._copy is None:
                raise self._refuse(error) from error
            self.commit = self._copy.name
            log_line(
                f"the hub can't be reached: {repository} is the copy of commit {self.commit} in the cache"
            )
            files = [file for file in self._copy.rglob("*") if file.is_file()]
            self.names = sorted(file.relative_to(self._copy).as_posix() for file in files)
        else:
            self.commit = str(info.sha)
            self.names = sorted(str(file.rfilename) for file in info.siblings or ())

    def fetch(self, name: str) -> Path:
        if self._copy is not None:
            return self._copy / name
        return Path(
            self._ask(
                lambda: self._hub.hf_hub_download(self.repository, name, revision=self.commit)
            )
        )

    def address(self, name: str) -> str:
        return f"{self.repository}/{name}"

    def cite(self, name: str) -> str:
        return f"hub:{self.repository}/{name}@{self.commit}"

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except Exception as error:  # the library and its network layer have many kinds
            raise self._refuse(error) from error

    def _refuse(self, error: Exception) -> InputError:
        return InputError(
            f"{self._name} is no file or folder here, and the hub does not give it ({summarize_error(error)}); "
            "without a network, give the path of a copy"
        )

    def _find_copy(self, library: Any, revision: str | None) -> Path | None:
        """The folder of a commit in the library's cache; None if there is none. Raises InputError if several fit.

        Files that were downloaded by their commit leave no note that it was the newest.
        """
        try:
            repositories = library.scan_cache_dir().repos
        except library.CacheNotFound:
            return None
        commits = [
            commit
            for each in repositories
            if (each.repo_type, each.repo_id) == ("model", self.repository)
            for commit in each.revisions
        ]
        named = [
            commit
            for commit in commits
            if (revision or NEWEST) in (commit.commit_hash, *commit.refs)
        ]
        fitting = named or ([] if revision else commits)
        if len(fitting) > 1:
            listed = ", ".join(sorted(commit.commit_hash for commit in fitting)[:MAX_COMMITS])
            raise InputError(
                f"{self._name}: the hub can't be reached, and the cache has {len(fitting)} commits of it; choose one with "
                f"revision=<commit>: {listed}"
            )
        return Path(fitting[0].snapshot_path) if fitting else None


def is_offline(error: Exception) -> bool:
    """Whether an error of the library is of the network: those with an answer of the hub carry the response, and a ValueError is
    the library's own, of a name that can't be one."""
    return getattr(error, "response", None) is None and not isinstance(error, ValueError)
