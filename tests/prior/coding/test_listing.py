"""Which files stage=compress and stage=decompress work on, and what their results are called."""

import re
from pathlib import Path

import pytest

from codegrid.engine.errors import InputError
from prior.coding.listing import list_inputs, place_result, refuse_failed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b/a.png", "b/c.PNG", "b/c.jpg", "note.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


SUFFIXES = (".png", ".jpg")


def test_a_folder_is_listed_with_all_below_it_and_names_are_paths(folder: Path) -> None:
    named = list_inputs(str(folder), SUFFIXES, "images")
    assert named == {
        "a": folder / "a.png",
        "b/a": folder / "b/a.png",
        "b/c.PNG": folder / "b/c.PNG",
        "b/c.jpg": folder / "b/c.jpg",
    }


def test_files_and_folders_may_be_mixed(folder: Path) -> None:
    named = list_inputs([f"{folder}/b/c.jpg", f"{folder}/b"], (".png",), "images")
    assert list(named) == ["c.jpg", "a", "c.PNG"]


def test_two_results_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"would both be called a\.png; give the folder above both"
    ):
        list_inputs([f"{folder}/a.png", f"{folder}/b/a.png"], SUFFIXES, "images")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "add files=<a folder of images>"),
        ([], "add files=<a folder of images>"),
        ("nowhere", "files=nowhere is not there; give a folder of images, a file, or a list"),
        ("empty", "files=empty holds no images (.png, .jpg)"),
    ],
)
def test_what_names_no_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: object, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=re.escape(sentence)):
        list_inputs(files, SUFFIXES, "images")  # type: ignore[arg-type]


def test_results_lie_as_their_inputs_do(tmp_path: Path) -> None:
    path = place_result(tmp_path / "files", "b/c.jpg", ".cgz")
    assert path == tmp_path / "files/b/c.jpg.cgz"
    assert path.parent.is_dir()


def test_failures_are_one_sentence_at_the_end(tmp_path: Path) -> None:
    refuse_failed({}, 3, tmp_path)
    with pytest.raises(InputError, match=r"a: is torn, and 1 more .* the other 3 files are in"):
        refuse_failed({"a": "is torn", "b": "is torn"}, 5, tmp_path)
