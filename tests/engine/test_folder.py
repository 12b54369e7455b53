"""A run folder: its name, and the files that the engine writes into it."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from codegrid.engine import folder as folder_module
from codegrid.engine.environment import describe_origin
from codegrid.engine.errors import InputError
from codegrid.engine.folder import (
    METRICS,
    RECORD,
    append_record,
    choose_folder,
    is_mere_claim,
    lock_folder,
    make_run_folder,
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


@pytest.mark.parametrize("run_dir", [None, "elsewhere/mine", "empty"])
def test_starts_at_the_same_moment_get_a_folder_each(run_dir: str | None) -> None:
    Path("empty").mkdir()
    results: list[Path | InputError] = []
    together = threading.Barrier(6)

    def start() -> None:
        together.wait()
        try:
            results.append(make_run_folder("vqgan", "shapes", run_dir))
        except InputError as refusal:
            results.append(refusal)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folders = [result for result in results if isinstance(result, Path)]
    if run_dir is None:
        assert len(set(folders)) == len(results) == 6
    else:
        assert folders == [Path(run_dir)]
        assert all(
            "was taken by another run" in str(r) or "is not empty" in str(r)
            for r in results
            if isinstance(r, InputError)
        )


def test_a_start_that_sees_a_free_name_which_is_then_taken_takes_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def take_first(*arguments: Any) -> Path:
        folder = choose_folder("vqgan", "shapes", None)
        if not folder.exists() and folder.name == "shapes":
            folder.mkdir(parents=True)  # another run, between the look and the mkdir
        return folder

    monkeypatch.setattr(folder_module, "choose_folder", take_first)
    assert make_run_folder("vqgan", "shapes", None) == Path("runs/vqgan/shapes-2")


def test_a_run_dir_that_another_start_has_just_claimed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def claim(stage: str, name: str, run_dir: str | None) -> Path:
        folder = choose_folder(stage, name, run_dir)
        folder.mkdir()
        (folder / RECORD).touch()
        return folder

    monkeypatch.setattr(folder_module, "choose_folder", claim)
    with pytest.raises(InputError, match=r"run_dir=mine was taken by another run at this moment"):
        make_run_folder("sample", "x", "mine")


def test_a_parent_that_is_a_file_is_an_error_of_the_disk() -> None:
    Path("runs").write_text("")
    with pytest.raises(OSError, match="runs"):
        make_run_folder("vqgan", "shapes", None)
    with pytest.raises(OSError, match="runs"):
        make_run_folder("vqgan", "shapes", "runs/x")


def test_what_a_run_leaves_that_is_killed_at_its_start_is_a_mere_claim() -> None:
    folder = make_run_folder("vqgan", "shapes", None)
    assert is_mere_claim(folder)
    (folder / "config.yaml.tmp").write_text("seed: 0")
    assert is_mere_claim(folder)
    (folder / "config.yaml").write_text("seed: 0")
    assert not is_mere_claim(folder)
    Path("empty").mkdir()
    assert not is_mere_claim(Path("empty"))
    assert not is_mere_claim(Path("missing"))


def test_a_folder_is_one_processs_at_a_time() -> None:
    folder = make_run_folder("vqgan", "shapes", None)
    with (
        lock_folder(folder),
        pytest.raises(
            InputError, match=r"is running in another process; .*resume=runs/vqgan/shapes"
        ),
    ):
        lock_folder(folder, seconds=0.2)
    lock_folder(folder, seconds=0).release()
