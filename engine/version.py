"""The version of this program and of the files that it writes, and what it says of files of another version."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from codegrid.engine.errors import InputError
from codegrid.engine.folder import read_record

VERSION = "0.2.0.dev0"

# The format of checkpoints and config.yaml, to be raised when an older program could not read them:
#   1   version 0.1, which wrote no version
#   2   version and format in both files; settings and classes have the names that engine/aliases.py maps to
#   3   the packages engine, data and evaluation are in codegrid
FORMAT = 3

STAMP = (
    "codegrid"  # the key of version and format in config.yaml, and of the header in a checkpoint
)


@dataclass(frozen=True)
class Stamp:
    """Which program wrote a file: its version, None for versions before 0.2, and the number of its format."""

    version: str | None = None
    format: int = 1

    @classmethod
    def read(cls, node: Any) -> "Stamp":
        """The stamp in a checkpoint's header or in config.yaml; without an entry, that of the versions that wrote none."""
        node = node if isinstance(node, Mapping) else {}
        version, number = node.get("version"), node.get("format")
        return cls(
            None if version is None else str(version), number if isinstance(number, int) else 1
        )

    @property
    def is_current(self) -> bool:
        """Whether this version of the program wrote the file."""
        return self.version == VERSION and self.format == FORMAT

    def __str__(self) -> str:
        return f"Codegrid {self.version or '0.1 or earlier'}"


def stamp_config(text: str) -> str:
    """The text of a config.yaml that says which program wrote it."""
    return f"{STAMP}:\n  version: {VERSION}\n  format: {FORMAT}\n{text}"


def check_format(source: str | Path, stamp: Stamp) -> None:
    """Raise InputError for a file in a format that only a later program can read."""
    if stamp.format > FORMAT:
        writer = f"was written by {stamp} and " if stamp.version else ""
        raise InputError(
            f"{source} {writer}has format {stamp.format}, this program reads up to {FORMAT}; "
            "update Codegrid"
        )


def refuse_version(source: str | Path, stamp: Stamp, difference: str) -> InputError:
    """The error for a sound file of another version that this one can't use; `difference` says what this version lacks."""
    revision = find_revision(Path(source))
    where = (
        f"git checkout {revision}" if revision else "card.md in its run folder names the revision"
    )
    return InputError(
        f"{source} was written by {stamp}, and this program is {VERSION}: {difference}; use the version that wrote it "
        f"({where}), or train again"
    )


def find_revision(source: Path) -> str | None:
    """The revision by which a run folder, its config.yaml or one of its checkpoints was written last; None if no record says
    it. Changes that were not committed then are not in it."""
    for folder in (source, source.parent, source.parent.parent):
        if revision := read_record(folder, "git"):
            return str(revision).removesuffix("-dirty")
    return None


@contextmanager
def name_version(source: str | Path, stamp: Stamp | None) -> Iterator[None]:
    """Report by its version a file whose settings don't fit this program's classes; all other errors pass.

    `stamp` is None for a config whose writer is not known.
    """
    try:
        yield
    except (InstantiationException, ConfigAttributeError, ConfigKeyError) as error:
        is_current = stamp is not None and stamp.is_current
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if is_current or not isinstance(cause, TypeError | ConfigAttributeError | ConfigKeyError):
            raise
        reason = " ".join(str(cause).split())
        if stamp is not None:
            raise refuse_version(source, stamp, f"its settings differ ({reason})") from error
        raise InputError(
            f"{source} has other settings than Codegrid {VERSION} ({reason}); if another version wrote it, use that one, "
            "or train again"
        ) from error
