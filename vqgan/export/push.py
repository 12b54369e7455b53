"""An export on the Hugging Face hub: the files of its folder as one commit of a repository."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from codegrid.engine.checkpoint import read_run_id
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, summarize_error
from codegrid.engine.folder import METRICS
from codegrid.engine.program import PROGRAM
from codegrid.engine.sweep import read_metrics
from codegrid.engine.words import format_word
from vqgan.export.card import README
from vqgan.export.folder import CHECKSUMS, list_checked
from vqgan.formats.hub import is_offline
from vqgan.formats.load import list_some

Reply = TypeVar("Reply")

REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
MAX_REPOSITORY_NAME = 96  # characters, by the hub's rules
HUBS_OWN = ".gitattributes"  # which every repository has
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")  # which the user may put beside
SHOWN_FILES = 5  # files in a sentence
STATUS = {
    401: "the hub does not know the token; store a new one with hf auth login, or in HF_TOKEN",
    403: "the token may not write there; give it write access, or name a repository of your own",
    412: "somebody committed to it at this moment; look at it",
}


@dataclass(frozen=True)
class Destination:
    """Where an export is pushed.

    repository    owner/name
    private       whether a new one is; None: as its owner has it
    replace       whether a commit may replace the files of a repository that has some
    """

    repository: str
    private: bool | None
    replace: bool

    @classmethod
    def read(cls, hub: Any, private: Any, replace: Any) -> "Destination | None":
        """From the settings hub, private and replace; None without a hub. Raises InputError for values that are none, and without
        the library, before anything is written."""
        if private not in (None, True, False):
            raise InputError(f"private={private} must be true, false or null")
        if replace not in (True, False):
            raise InputError(f"replace={replace} must be true or false")
        if hub is None:
            for name, value in (("private", private), ("replace", replace)):
                if value:
                    raise InputError(
                        f"{name}=true is about a repository; add hub=<owner/name>, or leave it out"
                    )
            return None
        check_repository(hub)
        open_library(hub)
        return cls(hub, private, replace)


def read_export(folder: Path, ckpt: str) -> dict[str, Any]:
    """The figures of an export that is there. Raises InputError for a folder that is none, or not of the run `ckpt`."""
    for name in (CHECKSUMS, METRICS, README):
        if not (folder / name).is_file():
            raise InputError(
                f"resume={folder} is no whole export, for {folder / name} is missing; leave resume out to export again"
            )
    figures = read_metrics(folder)
    if read_run_id(ckpt) not in (None, figures.get("of")):
        raise InputError(
            f"resume={folder} is an export of another run than ckpt={ckpt}; leave ckpt out to push it, or resume to export that run"
        )
    return figures


def check_repository(name: Any) -> None:
    """Raise InputError unless the hub admits a repository of this name."""
    is_whole = isinstance(name, str) and REPOSITORY.fullmatch(name)
    if (
        not is_whole
        or len(name.partition("/")[2]) > MAX_REPOSITORY_NAME
        or re.search(r"--|\.\.|[.-](/|$)|\.git$", name)
    ):
        raise InputError(
            f"hub={name} must be owner/name, each of letters, digits, -, _ and . that neither begins nor ends with - or ., "
            f"without -- or .., the name of {MAX_REPOSITORY_NAME} characters at most"
        )


def open_library(repository: str) -> Any:
    """The library of the hub. Raises InputError if it is not installed."""
    try:
        import huggingface_hub  # an extra
    except ImportError as error:
        raise InputError(
            f'hub={repository} needs the library huggingface_hub; pip install "codegrid[hf]"'
        ) from error
    return huggingface_hub


class Push:
    """A folder of stage=export on its way to the hub. All refusals say that the folder stays, and how to push it later."""

    def __init__(self, folder: Path, destination: Destination) -> None:
        self.folder = folder
        self.repository = destination.repository
        self._private, self._replace = destination.private, destination.replace
        self._library = open_library(destination.repository)
        self._api: Any = self._library.HfApi()

    def run(self) -> dict[str, str]:
        """Push the files in one commit, into a new repository if there is none; its address. Nothing is pushed twice."""
        files = list_pushed(self.folder)
        try:
            info = self._open_repository()
            remote = {str(file.rfilename) for file in info.siblings or ()} - {HUBS_OWN}
            if remote and self._is_same(files, remote, info.sha):
                log_line(f"{self.repository} has this export already, as commit {info.sha}")
                return self._describe(str(info.sha))
            if remote and not self._replace:
                raise self._refuse(
                    f"it has files already ({list_some(sorted(remote), SHOWN_FILES)}); replace=true exchanges all of them in one "
                    "commit, and its history keeps the earlier ones; or name another",
                    "replace=true",
                    private=self._private,
                )
            commit = self._commit(files, remote - files.keys(), info.sha)
        except KeyboardInterrupt:
            log_line(f"{self.folder} is written, and was not pushed; {self._advise(self._private)}")
            raise
        log_line(f"pushed to {commit.commit_url}")
        return self._describe(str(commit.oid))

    def _open_repository(self) -> Any:
        """What the hub says of the repository, which is created if there is none."""
        if self._ask(self._library.get_token) is None:
            raise self._refuse(
                "no token of the hub is stored here: hf auth login stores one, or HF_TOKEN has it",
                private=self._private,
            )
        private = self._private
        exists = self._ask(lambda: self._api.repo_exists(self.repository))
        if not exists:
            self._ask(lambda: self._api.create_repo(self.repository, private=private))
        info = self._ask(lambda: self._api.model_info(self.repository))
        if exists and private is not None and bool(info.private) != private:
            raise self._refuse(
                f"it is {'private' if info.private else 'public'}, and private={str(private).lower()} is for a new repository; "
                "change that on its page, and leave private out",
                private=None,
            )
        return info

    def _is_same(self, files: Mapping[str, Path], remote: Iterable[str], commit: str) -> bool:
        """Whether the repository has these files, by their checksums and the card, which has none."""
        if files.keys() != set(remote):
            return False
        return all(
            self._download(name, commit).read_bytes() == files[name].read_bytes()
            for name in (CHECKSUMS, README)
        )

    def _download(self, name: str, commit: str) -> Path:
        return Path(
            self._ask(lambda: self._api.hf_hub_download(self.repository, name, revision=commit))
        )

    def _commit(self, files: Mapping[str, Path], removed: Iterable[str], parent: str) -> Any:
        """One commit, unlike upload_folder, which may make several of them."""
        library = self._library
        operations = [
            *(library.CommitOperationAdd(name, file) for name, file in files.items()),
            *(library.CommitOperationDelete(name) for name in sorted(removed)),
        ]
        return self._ask(
            lambda: self._api.create_commit(
                self.repository,
                operations,
                commit_message=f"Export of {self.folder.name} by Codegrid",
                parent_commit=parent,
            )
        )

    def _describe(self, commit: str) -> dict[str, str]:
        return {
            "repository": self.repository,
            "url": f"{self._api.endpoint}/{self.repository}",
            "commit": commit,
        }

    def _ask(self, question: Callable[[], Reply]) -> Reply:
        try:
            return question()
        except Exception as error:  # the library and its network layer have many kinds
            raise self._refuse(explain_failure(error), private=self._private) from error

    def _refuse(self, reason: str, *words: str, private: bool | None) -> InputError:
        return InputError(
            f"{self.folder} is written and stays, and is not pushed to hub={self.repository}: {reason}; "
            f"{self._advise(private, *words)}"
        )

    def _advise(self, private: bool | None, *words: str) -> str:
        """The command that pushes later."""
        first = ["stage=export", format_word("resume", self.folder), f"hub={self.repository}"]
        chosen = [] if private is None else [f"private={str(private).lower()}"]
        return f"push it with: {PROGRAM} {' '.join([*first, *chosen, *words])}"


def explain_failure(error: Exception) -> str:
    """Why the hub did not do what it was asked, as a clause."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in STATUS:
        return STATUS[status]
    reason = summarize_error(error)
    return f"the hub can't be reached ({reason})" if is_offline(error) else reason


def list_pushed(folder: Path) -> dict[str, Path]:
    """The files of an export that are for others, by their names: not the record of the command, whose paths are those of this
    machine. Raises InputError if the folder is no export any more."""
    beside = [name for name in (README, *LICENCE_FILES) if (folder / name).is_file()]
    return {name: folder / name for name in (*list_checked(folder), CHECKSUMS, *beside)}
