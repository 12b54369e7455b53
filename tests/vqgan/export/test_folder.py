"""A folder that is there whole or not at all."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from codegrid.engine.errors import InputError
from vqgan.export.folder import CHECKSUMS, choose_target, hide_folder, publish, write_files


def write(target: Path, files: dict[str, bytes]) -> None:
    with hide_folder(target) as hidden:
        write_files(hidden, target, files)
        assert not target.exists() or not any(target.iterdir())
        publish(hidden, target)


@pytest.mark.parametrize("is_there", [False, True])
def test_all_files_appear_at_once_with_their_checksums(is_there: bool, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    if is_there:
        target.mkdir(parents=True)
    files = {"a": b"1", "b/c": b"23"}
    write(target, files)
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in files)
    assert (target / CHECKSUMS).read_text() == sums
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
        InputError, match=r"can't write the folder .*out \(No space left on device\)"
    ):
        write(tmp_path / "out", {"a": b"1"})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't write the folder"):
        write(tmp_path / "file" / "out", {"a": b"1"})


def test_files_that_came_meanwhile_are_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(InputError, match="can't write the folder"), hide_folder(target) as hidden:
        write_files(hidden, target, {"a": b"1"})
        target.mkdir()
        (target / "theirs").write_text("stays")
        publish(hidden, target)
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
