"""A run folder: its name, and the files that the engine writes into it."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.environment import describe_origin
from engine.errors import InputError
from engine.folder import (
    METRICS,
    RECORD,
    append_record,
    choose_folder,
    next_free_folder,
    write_atomically,
    write_metrics,
)


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_folder_is_named_after_stage_and_data_and_numbered_if_taken() -> None:
    folders = []
    for _ in range(3):
        folders.append(choose_folder("vqgan", "shapes", None))
        folders[-1].mkdir(parents=True)
    assert [str(folder) for folder in folders] == [
        "runs/vqgan/shapes", "runs/vqgan/shapes-2", "runs/vqgan/shapes-3",
    ]  # fmt: skip
    assert next_free_folder(Path("runs/vqgan/mine")) == Path("runs/vqgan/mine")
    assert next_free_folder(Path("runs/vqgan/shapes")) == Path("runs/vqgan/shapes-4")


def test_choosing_a_folder_makes_none() -> None:
    assert choose_folder("vqgan", "shapes", None) == choose_folder("vqgan", "shapes", None)
    assert not Path("runs").exists()


def test_run_dir_takes_the_place_of_the_name() -> None:
    assert choose_folder("vqgan", "shapes", "elsewhere/a") == Path("elsewhere/a")


@pytest.mark.parametrize("name", ["a/b", "..", ".", "/a"])
def test_a_name_with_a_path_in_it_is_refused(name: str) -> None:
    with pytest.raises(
        InputError,
        match=r"must be the name of one folder below runs/vqgan; a path goes to run_dir=",
    ):
        choose_folder("vqgan", name, None)


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(InputError, match=r"is not empty; continue that run with resume="):
        choose_folder("vqgan", "shapes", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert choose_folder("vqgan", "shapes", str(tmp_path)) == tmp_path


def test_the_record_has_a_line_for_each_start(tmp_path: Path) -> None:
    append_record(tmp_path, describe_origin(), {"title": "shapes"})
    append_record(tmp_path, describe_origin(), None)
    first, second = map(json.loads, (tmp_path / RECORD).read_text().splitlines())
    assert first["data"] == {"title": "shapes"}
    assert "data" not in second
    assert {"time", "command", "git", "torch", "lightning", "device", "cores"} <= second.keys()


def test_a_text_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    write_atomically(file, "old")

    def fail(*_: Any) -> None:
        raise OSError("killed before the rename")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_figures_that_can_not_be_written_are_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf'{METRICS} can\'t be written .*: {{"psnr": 20.5}}'):
        write_metrics(tmp_path / "missing", {"psnr": 20.5})
