"""A folder that is there whole or not at all."""

import errno
import hashlib
import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from codegrid.engine.errors import InputError
from codegrid.engine.exit_codes import TERMINATED
from vqgan.export.folder import (
    CHECKSUMS,
    choose_target,
    hide_folder,
    list_checked,
    publish,
    write_files,
)


def write(target: Path, files: dict[str, bytes]) -> None:
    with hide_folder(target) as hidden:
        write_files(hidden, target, files)
        assert not target.exists() or not any(target.iterdir())
        publish(hidden, target, ["c"])


@pytest.mark.parametrize("is_there", [False, True])
def test_all_files_appear_at_once_with_their_checksums(is_there: bool, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    if is_there:
        target.mkdir(parents=True)
    files = {"a": b"1", "b/c": b"23"}
    write(target, {**files, "c": b"a card"})
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in files)
    assert (target / CHECKSUMS).read_text() == sums
    assert list_checked(target) == ["a", "b/c"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [InputError("the check"), KeyboardInterrupt(), ValueError("bug")])
def test_nothing_stays_of_an_export_that_ends_before(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), hide_folder(tmp_path / "out") as hidden:
        write_files(hidden, tmp_path / "out", {"a": b"1"})
        raise error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        InputError,
        match=r"can't write the folder .*out \(No space left on device\).*; free some space",
    ):
        write(tmp_path / "out", {"a": b"1"})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't write the folder .* stays; name another"):
        write(tmp_path / "file" / "out", {"a": b"1"})


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_behind_a_link_is_written_there(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    if exists:
        (tmp_path / "disk" / "out").mkdir()
    write(tmp_path / "link", {"a": b"1"})
    assert (tmp_path / "link").is_symlink()
    assert list_checked(tmp_path / "disk" / "out") == ["a"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_sigterm_clears_away_what_was_begun_and_is_left_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, hide_folder(tmp_path / "out") as hidden:
        write_files(hidden, tmp_path / "out", {"a": b"1"})
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == TERMINATED
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_of_somebody_else_and_threads_are_left_alone(tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        write(tmp_path / "out", {"a": b"1"})
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    thread = Thread(target=write, args=(tmp_path / "other", {"a": b"1"}))
    thread.start()
    thread.join()
    assert list_checked(tmp_path / "other") == ["a"]


def test_files_that_came_meanwhile_are_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(InputError, match=r"out has files by now, .*; name another folder"),
        hide_folder(target) as hidden,
    ):
        write_files(hidden, target, {"a": b"1"})
        target.mkdir()
        (target / "theirs").write_text("stays")
        publish(hidden, target, [])
    assert [(file.name, file.read_text()) for file in target.iterdir()] == [("theirs", "stays")]


def test_a_folder_with_files_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for path in (tmp_path, tmp_path / "a"):
        with pytest.raises(
            InputError, match="exists and is not empty, and an export overwrites nothing"
        ):
            choose_target("export", "name", str(path))


def test_without_run_dir_the_name_is_numbered(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_target("export", "photos", None) == Path("runs/export/photos")
    Path("runs/export/photos").mkdir(parents=True)
    assert choose_target("export", "photos", None) == Path("runs/export/photos-2")
    with pytest.raises(InputError, match="name=a/b must be the name of one folder"):
        choose_target("export", "a/b", None)


@pytest.mark.parametrize("change", ["change", "remove"])
def test_a_file_that_changed_is_no_file_of_the_export(change: str, tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": b"1", "c": b"a card"})
    (tmp_path / "out" / "c").write_bytes(b"edited")
    assert list_checked(tmp_path / "out") == ["a"]
    file = tmp_path / "out" / "a"
    file.write_bytes(b"2") if change == "change" else file.unlink()
    with pytest.raises(InputError, match=r"out/a is not what the export wrote, by its checksum"):
        list_checked(tmp_path / "out")
