"""A folder that is there whole or not at all: written under a hidden name beside, checked, then renamed."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from codegrid.engine.errors import InputError
from codegrid.engine.folder import choose_folder

CHECKSUMS = "SHA256SUMS"  # as `sha256sum --check` reads it


def choose_target(stage: str, name: str, run_dir: str | None) -> Path:
    """The folder to write: `run_dir`, or runs/<stage>/<name>, numbered if there is one. Raises InputError for one with files in
    it."""
    folder = choose_folder(stage, name, None)
    if run_dir is None:
        return folder
    folder = Path(run_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"run_dir={folder} exists and is not empty, and an export overwrites nothing; name another folder"
        )
    return folder


@contextmanager
def hide_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`, which is removed unless it has been published.

    Raises InputError where the disk refuses, from within the block too.
    """
    hidden = target.resolve().parent / f".export-{secrets.token_hex(4)}"
    try:
        with explain_refusal(target):
            hidden.mkdir(parents=True)
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def explain_refusal(target: Path) -> Iterator[None]:
    """An error of the disk as a sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"can't write the folder {target} ({error.strerror or error}), and nothing of it stays; free some space, or name "
            "another with run_dir=..."
        ) from error


def write_files(folder: Path, target: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their paths in a hidden folder. Raises InputError, which speaks of `target`, where the disk refuses."""
    with explain_refusal(target):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def publish(hidden: Path, target: Path) -> None:
    """Add the checksums of all files to a hidden folder and rename it. Raises InputError where the disk refuses, or if `target`
    has files by now."""
    files = sorted(file for file in hidden.rglob("*") if file.is_file())
    lines = [f"{hash_file(file)}  {file.relative_to(hidden).as_posix()}\n" for file in files]
    write_files(hidden, target, {CHECKSUMS: "".join(lines).encode()})
    with explain_refusal(target):
        hidden.rename(target)


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
