"""A folder that is there whole or not at all: written under a hidden name beside, checked, then renamed."""

import errno
import hashlib
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from codegrid.engine.errors import InputError
from codegrid.engine.exit_codes import TERMINATED
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
    """A new hidden folder beside `target`, which is removed unless it has been published, after SIGTERM too.

    Raises InputError where the disk refuses, from within the block too.
    """
    hidden = target.resolve().parent / f".export-{secrets.token_hex(4)}"
    with raise_on_sigterm():
        try:
            with explain_refusal(target):
                hidden.mkdir(parents=True)
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM, with which schedulers end a program, as an exception, so that what was begun is cleared away.

    Only where nobody else handles it, and in the main thread, which alone may set handlers.
    """

    def stop(*_: object) -> None:
        raise SystemExit(TERMINATED)

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def explain_refusal(target: Path) -> Iterator[None]:
    """An error of the disk as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(
                f"{target} has files by now, as of another export at this moment, and nothing is overwritten; name another folder "
                "with run_dir=..."
            ) from error
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(
            f"can't write the folder {target} ({error.strerror or error}), and nothing of it stays; "
            f"{'free some space, or ' if is_full else ''}name another with run_dir=..."
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


def publish(hidden: Path, target: Path, unlisted: Collection[str]) -> None:
    """Add the checksums of all files but the `unlisted` to a hidden folder and rename it. Raises InputError where the disk
    refuses, or if `target` has files by now."""
    files = sorted(file for file in hidden.rglob("*") if file.is_file())
    names = [file.relative_to(hidden).as_posix() for file in files]
    lines = [f"{hash_file(hidden / name)}  {name}\n" for name in names if name not in unlisted]
    write_files(hidden, target, {CHECKSUMS: "".join(lines).encode()})
    with explain_refusal(target):
        hidden.rename(target.resolve())  # behind a link: the hidden folder is on the same disk


def list_checked(folder: Path) -> list[str]:
    """The files with a checksum, by their names. Raises InputError if one is missing or has another content now."""
    names = []
    for line in (folder / CHECKSUMS).read_text().splitlines():
        checksum, _, name = line.partition("  ")
        if not (folder / name).is_file() or hash_file(folder / name) != checksum:
            raise InputError(
                f"{folder / name} is not what the export wrote, by its checksum in {CHECKSUMS}; export again into another folder"
            )
        names.append(name)
    return names


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
