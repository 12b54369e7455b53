import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegrid.data.store import Arrays, CacheEntry, fingerprint, load_or_fill
from codegrid.engine.errors import InputError

SPEC = {"a": ((3, 2), "uint8"), "b": ((3,), "int64")}


def fill(arrays: Arrays) -> dict[str, str]:
    arrays["a"][:] = 7
    arrays["b"][:] = [1, 2, 3]
    return {"filled": "once"}


def forbidden(arrays: Arrays) -> None:
    raise AssertionError("the entry exists already")


def entries(folder: Path) -> list[Path]:
    """Finished and unfinished entries. Lock files stay, because another run may be waiting for them."""
    return [path for path in folder.iterdir() if not path.name.endswith(".lock")]


def make_checksummed(folder: Path) -> CacheEntry:
    """A finished entry with a checksum of array a."""
    entry = CacheEntry(folder, "x", 1, SPEC)
    with entry.acquire():
        arrays = entry.create()
        fill(arrays)
        entry.publish(arrays, checksummed=("a",))
    return entry


def test_a_filled_entry_is_read_back_without_filling_it_again(tmp_path: Path) -> None:
    load_or_fill(tmp_path, "x", {"k": 1}, SPEC, fill)
    arrays, _ = load_or_fill(tmp_path, "x", {"k": 1}, SPEC, forbidden)
    assert arrays["a"].tolist() == [[7, 7]] * 3
    assert arrays["b"].tolist() == [1, 2, 3]


def test_notes_come_back_from_the_cache(tmp_path: Path) -> None:
    assert load_or_fill(tmp_path, "x", 1, SPEC, fill)[1] == {"filled": "once"}
    assert load_or_fill(tmp_path, "x", 1, SPEC, forbidden)[1] == {"filled": "once"}


def test_arrays_from_the_store_are_read_only(tmp_path: Path) -> None:
    for _ in range(2):
        arrays, _notes = load_or_fill(tmp_path, "x", 1, SPEC, fill)
        with pytest.raises(ValueError, match="read-only"):
            arrays["a"][0, 0] = 1


def test_arrays_without_rows_are_stored_too(tmp_path: Path) -> None:
    none = {"a": ((0, 2), "uint8")}
    load_or_fill(tmp_path, "x", 1, none, lambda arrays: None)
    assert load_or_fill(tmp_path, "x", 1, none, forbidden)[0]["a"].shape == (0, 2)


def test_another_key_or_shape_is_another_entry(tmp_path: Path) -> None:
    load_or_fill(tmp_path, "x", {"k": 1}, SPEC, fill)
    with pytest.raises(AssertionError):
        load_or_fill(tmp_path, "x", {"k": 2}, SPEC, forbidden)
    with pytest.raises(AssertionError):
        load_or_fill(tmp_path, "x", {"k": 1}, {**SPEC, "a": ((4, 2), "uint8")}, forbidden)


def test_the_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_run_that_stops_leaves_nothing_and_frees_the_lock(tmp_path: Path) -> None:
    def die(arrays: Arrays) -> None:
        fill(arrays)
        raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt
    ):  # whose traceback holds the frames, and so the entry, of the stopped run
        load_or_fill(tmp_path, "x", 1, SPEC, die)
    assert entries(tmp_path) == []
    assert not CacheEntry(tmp_path, "x", 1, SPEC).lock.is_held
    assert load_or_fill(tmp_path, "x", 1, SPEC, fill)[0]["b"].tolist() == [1, 2, 3]


def test_the_lock_is_released_after_the_with_statement(tmp_path: Path) -> None:
    mine, other = (CacheEntry(tmp_path, "x", 1, SPEC) for _ in range(2))
    with mine.acquire():
        assert mine.lock.is_held
    other.lock.take().release()


def test_a_killed_process_leaves_nothing_that_looks_finished_and_the_next_run_succeeds_at_once(
    tmp_path: Path,
) -> None:
    program = """
        import sys, time
        from codegrid.data.store import load_or_fill

        def fill(arrays):
            arrays["a"][:] = 9
            print("filling", flush=True)
            time.sleep(60)

        load_or_fill(sys.argv[1], "x", 1, {"a": ((3, 2), "uint8"), "b": ((3,), "int64")}, fill)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "filling\n"
        process.send_signal(signal.SIGKILL)
    assert [path.suffix for path in entries(tmp_path)] == [".part"]
    assert CacheEntry(tmp_path, "x", 1, SPEC).read() is None
    assert load_or_fill(tmp_path, "x", 1, SPEC, fill)[0]["a"].tolist() == [[7, 7]] * 3
    assert len(entries(tmp_path)) == 1


def test_a_second_run_waits_for_the_first_says_so_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("codegrid.engine.locks.SECONDS_UNTIL_NOTICE", 0.01)
    filling, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(
        "codegrid.engine.locks.log_line", lambda sentence: (print(sentence), waiting.set())
    )

    def slow(arrays: Arrays) -> dict[str, str]:
        filling.set()
        assert waiting.wait(10)
        return fill(arrays)

    first = threading.Thread(target=load_or_fill, args=(tmp_path, "x", 1, SPEC, slow))
    first.start()
    assert filling.wait(10)
    arrays, notes = load_or_fill(tmp_path, "x", 1, SPEC, forbidden)
    first.join()
    assert "is being made by another run; waiting for it" in capsys.readouterr().out
    assert arrays["b"].tolist() == [1, 2, 3]
    assert notes == {"filled": "once"}


def test_of_many_runs_at_once_one_fills_and_all_get_whole_arrays(tmp_path: Path) -> None:
    filled, results = [], []

    def count(arrays: Arrays) -> dict[str, str]:
        filled.append(1)
        return fill(arrays)

    runs = [
        threading.Thread(target=lambda: results.append(load_or_fill(tmp_path, "x", 1, SPEC, count)))
        for _ in range(8)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(filled) == 1
    assert [arrays["b"].tolist() for arrays, _ in results] == [[1, 2, 3]] * 8


def cut(entry: Path) -> None:
    os.truncate(entry / "a.npy", 130)


def no_header(entry: Path) -> None:
    os.truncate(entry / "a.npy", 5)


def no_array(entry: Path) -> None:
    (entry / "b.npy").unlink()


def no_json(entry: Path) -> None:
    (entry / "meta.json").write_text("{")


def another_json(entry: Path) -> None:
    (entry / "meta.json").write_text("[]")


def no_notes(entry: Path) -> None:
    (entry / "meta.json").write_text(json.dumps({"sums": {}}))


@pytest.mark.parametrize("damage", [cut, no_header, no_array, no_json, another_json, no_notes])
def test_a_damaged_entry_is_logged_and_made_anew(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    load_or_fill(tmp_path, "x", 1, SPEC, fill)
    damage(entries(tmp_path)[0])
    assert load_or_fill(tmp_path, "x", 1, SPEC, fill)[0]["a"].tolist() == [[7, 7]] * 3
    assert "is damaged (" in capsys.readouterr().err
    load_or_fill(tmp_path, "x", 1, SPEC, forbidden)


def test_one_changed_byte_of_a_checksummed_array_is_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = make_checksummed(tmp_path)
    assert entry.read() is not None
    with (entry.final / "a.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x08")
    assert entry.read() is None
    assert "(a.npy's checksum is wrong); it is made anew" in capsys.readouterr().err


def test_a_resumed_run_finds_what_the_killed_one_wrote(tmp_path: Path) -> None:
    CacheEntry(tmp_path, "x", 1, SPEC).create()["b"][1] = 5
    assert CacheEntry(tmp_path, "x", 1, SPEC).reopen()["b"].tolist() == [0, 5, 0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_with_the_space_needed_and_leaves_nothing_behind(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    large = {"a": ((3 * 2**20,), "uint8"), "b": ((2**18,), "int64")}
    with pytest.raises(
        InputError,
        match=rf"no room for 5 MiB in {tmp_path}; name another folder with cache_dir=\.\.\.",
    ):
        CacheEntry(tmp_path, "x", 1, large).create()
    assert entries(tmp_path) == []


def test_a_disk_that_fills_up_at_the_last_moment_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="no room for"):
        load_or_fill(tmp_path, "x", 1, SPEC, fill)
    assert entries(tmp_path) == []


def test_disk_space_is_allocated_before_anything_is_filled(tmp_path: Path) -> None:
    def look(arrays: Arrays) -> None:
        (part,) = entries(tmp_path)
        assert (part / "a.npy").stat().st_blocks * 512 >= 2**20

    load_or_fill(tmp_path, "x", 1, {"a": ((2**20,), "uint8")}, look)


def test_a_finished_entry_in_a_read_only_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_fill(tmp_path, "x", 1, SPEC, fill)

    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in (
        (os, "mkdir"),
        (os, "replace"),
        (os, "posix_fallocate"),
        (shutil, "rmtree"),
        (CacheEntry, "acquire"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert load_or_fill(tmp_path, "x", 1, SPEC, forbidden)[0]["b"].tolist() == [1, 2, 3]


def test_a_read_only_folder_without_the_entry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("codegrid.engine.locks.FileLock.acquire", refuse)
    with pytest.raises(
        InputError, match=r"can't write the cache folder .*Read-only.* name another with cache_dir="
    ):
        load_or_fill(tmp_path, "x", 1, SPEC, fill)


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="name another with cache_dir="):
        load_or_fill(tmp_path / "cache", "x", 1, SPEC, fill)


def test_a_value_that_the_arrays_cannot_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    def overflow(arrays: Arrays) -> None:
        arrays["a"][:] = np.full((5, 5), 1)

    with pytest.raises(ValueError, match="broadcast"):
        load_or_fill(tmp_path, "x", 1, SPEC, overflow)
    assert entries(tmp_path) == []
