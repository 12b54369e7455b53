from pathlib import Path

import pytest

from data.errors import InputError
from data.store import Arrays, fingerprint, stored

SPEC = {"a": ((3, 2), "uint8"), "b": ((3,), "int64")}


def fill(arrays: Arrays) -> None:
    arrays["a"][:] = 7
    arrays["b"][:] = [1, 2, 3]


def forbidden(arrays: Arrays) -> None:
    raise AssertionError("the cache was there already")


def test_what_was_filled_is_read_back_without_filling_again(tmp_path: Path) -> None:
    stored(tmp_path, "x", {"k": 1}, SPEC, fill)
    arrays = stored(tmp_path, "x", {"k": 1}, SPEC, forbidden)
    assert arrays["a"].tolist() == [[7, 7]] * 3
    assert arrays["b"].tolist() == [1, 2, 3]


def test_arrays_from_the_store_are_read_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        stored(tmp_path, "x", 1, SPEC, fill)["a"][0, 0] = 1


def test_another_key_or_shape_is_another_entry(tmp_path: Path) -> None:
    stored(tmp_path, "x", {"k": 1}, SPEC, fill)
    with pytest.raises(AssertionError):
        stored(tmp_path, "x", {"k": 2}, SPEC, forbidden)
    with pytest.raises(AssertionError):
        stored(tmp_path, "x", {"k": 1}, {**SPEC, "a": ((4, 2), "uint8")}, forbidden)


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def die(arrays: Arrays) -> None:
        fill(arrays)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, "x", 1, SPEC, die)
    assert list(tmp_path.iterdir()) == []
    assert stored(tmp_path, "x", 1, SPEC, fill)["b"].tolist() == [1, 2, 3]


def test_of_two_runs_at_once_both_get_whole_arrays(tmp_path: Path) -> None:
    def meanwhile(arrays: Arrays) -> None:
        stored(tmp_path, "x", 1, SPEC, fill)
        fill(arrays)

    assert stored(tmp_path, "x", 1, SPEC, meanwhile)["b"].tolist() == [1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="name another with cache_dir="):
        stored(tmp_path / "cache", "x", 1, SPEC, fill)
