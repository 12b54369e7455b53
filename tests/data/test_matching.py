"""Rows of tables and the files that they name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from codegrid.data.matching import NONE, FileNames, Match, choose_reading, clean_path, match_rows
from codegrid.data.tables import open_table
from codegrid.engine.errors import InputError

FILES = ["cats/1.png", "cats/2.png", "dogs/3.jpg"]


def match(
    table: Path, root: Path, files: list[str], columns: list[str] | None = None
) -> tuple[str, str, Match]:
    """The column and the reading that are chosen, and the match of all rows."""
    opened = open_table(table, f"data.labels={table.name}", [])
    column, reading = choose_reading(opened, columns or opened.columns, FileNames(root, files))
    [values] = opened.read([column])
    assert isinstance(values, list)
    return column, reading.how, match_rows(reading, values, len(files))


def table_of(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f'{i},"{name}",x' for i, name in enumerate(names)]
    (folder / "t.csv").write_text("\n".join(["n,file,kind", *rows]))
    return folder / "t.csv"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    return tmp_path / "data" / "images"


WAYS: dict[str, Callable[[str, Path], str]] = {
    "below the root": lambda name, root: name,
    "with a point": lambda name, root: f"./{name}",
    "Windows": lambda name, root: name.replace("/", "\\"),
    "without endings": lambda name, root: name[:-4],
    "from the table": lambda name, root: f"images/{name}",
    "from the table without endings": lambda name, root: f"images/{name[:-4]}",
    "absolute": lambda name, root: f"{root}/{name}",
    "from elsewhere": lambda name, root: f"/home/a/pictures/{name}",
    "from a Windows elsewhere": lambda name, root: f"C:\\x\\{name}".replace("/", "\\"),
    "names alone": lambda name, root: name.split("/")[1],
    "names alone without endings": lambda name, root: name.split("/")[1][:-4],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_rows_find_their_files_however_they_name_them(root: Path, way: str, inside: bool) -> None:
    names = [WAYS[way](name, root) for name in reversed(FILES)]
    table = table_of(root if inside else root.parent, names)
    column, _, matched = match(table, root, FILES, ["file", "kind"])
    assert column == "file"
    assert matched.rows.tolist() == [2, 1, 0]
    assert not matched.unused.any()
    assert not matched.doubled


def test_a_path_from_the_folder_of_the_table_may_climb(root: Path) -> None:
    table = table_of(root.parent / "tables", [f"../images/{name}" for name in FILES])
    assert match(table, root, FILES)[2].rows.tolist() == [0, 1, 2]


def test_letters_are_the_same_however_unicode_spells_them(root: Path) -> None:
    table = table_of(root, ["u\u0308.png", "b.png"])
    assert match(table, root, ["b.png", "\u00fc.png"])[2].rows.tolist() == [1, 0]


def test_rows_and_files_without_partners_and_doubled_rows_are_counted(root: Path) -> None:
    table = table_of(root, ["b.png", "x.png", "a.png", "", "b.png", "b.png"])
    _, _, matched = match(table, root, ["a.png", "b.png", "c.png"])
    assert matched.rows.tolist() == [2, 0, NONE]
    assert matched.unused.tolist() == [False, True, False, True, False, False]
    assert matched.doubled == {1: [0, 4, 5]}


def test_a_name_of_several_files_names_none(root: Path) -> None:
    _, _, matched = match(table_of(root, ["a", "b"]), root, ["a.jpg", "a.png", "b.png"])
    assert matched.rows.tolist() == [NONE, NONE, 1]
    assert matched.vague.tolist() == [True, False]
    _, _, matched = match(
        table_of(root, ["1.png", "2.png"]), root, ["x/1.png", "y/1.png", "y/2.png"]
    )
    assert matched.rows.tolist() == [NONE, NONE, 1]


def test_of_two_folders_in_a_table_that_of_the_root_is_read(tmp_path: Path) -> None:
    """Each has an image of the same name, and neither may have the label of the other."""
    table = table_of(tmp_path / "tables", ["test/1.png", "train/1.png", "test/2.png"])
    _, how, matched = match(table, tmp_path / "elsewhere" / "train", ["1.png", "2.png"])
    assert how == "paths after train/"
    assert matched.rows.tolist() == [1, NONE]


def test_two_folders_that_are_as_likely_are_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path / "tables", ["a/1.png", "b/1.png", "a/2.png", "b/2.png"])
    with pytest.raises(
        InputError, match=r"as paths after a/ and as paths after b/, and not the same ones; write"
    ):
        match(table, tmp_path / "elsewhere", ["1.png", "2.png"])


def test_the_root_and_the_folder_of_the_table_may_not_contradict_each_other(root: Path) -> None:
    table = table_of(root / "cats", ["1.png", "2.png"])
    with pytest.raises(
        InputError, match="names images of .* as paths below .* and as paths from the folder of the"
    ):
        match(table, root, ["1.png", "2.png", "cats/1.png", "cats/2.png"])


def test_names_with_endings_are_preferred_to_numbers_that_happen_to_be_names(root: Path) -> None:
    files = ["0.png", "1.png", "2.png"]
    column, _, matched = match(table_of(root, files[::-1]), root, files)
    assert (column, matched.rows.tolist()) == ("file", [2, 1, 0])


def test_two_columns_that_name_other_files_are_refused(root: Path) -> None:
    (root / "t.csv").write_text("id,age\n0,2\n1,0\n2,1\n")
    with pytest.raises(
        InputError,
        match=r"^the columns id and age of .*t\.csv both name images .*data\.file_column=id$",
    ):
        match(root / "t.csv", root, ["0.png", "1.png", "2.png"])
    assert match(root / "t.csv", root, ["0.png", "1.png", "2.png"], ["age"])[2].rows.tolist() == [
        1,
        2,
        0,
    ]


def test_a_column_of_other_files_of_the_folder_is_refused(root: Path) -> None:
    (root / "t.csv").write_text("image,mask\na.png,a_mask.png\nb.png,b_mask.png\n")
    files = ["images/a.png", "images/b.png", "masks/a_mask.png", "masks/b_mask.png"]
    with pytest.raises(
        InputError, match=r"^the columns image and mask of .*data\.file_column=image$"
    ):
        match(root / "t.csv", root, files)


def test_a_column_that_names_a_file_by_chance_is_no_rival(root: Path) -> None:
    rows = [f"{i}.png,{i}" for i in range(8)]
    rows[3] = "3.png,5.png"
    (root / "t.csv").write_text("\n".join(["file,note", *rows]))
    assert match(root / "t.csv", root, [f"{i}.png" for i in range(8)])[0] == "file"


def test_files_that_the_first_rows_do_not_name_are_still_there(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.data.matching.SAMPLED_ROWS", 2)
    table = table_of(root, ["x.png", "y.png", "z.png", "a.png"])
    assert match(table, root, ["a.png"])[2].rows.tolist() == [3]


@pytest.mark.parametrize("sampled", [1, 10])
def test_a_table_of_other_images_shows_how_both_call_them(
    root: Path, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.data.matching.SAMPLED_ROWS", sampled)
    table = table_of(root, ["x.png", "y.png"])
    sentence = r"names no image of .*: its first row has n=0, file=x\.png, kind=x, and the first image is a\.png; "
    with pytest.raises(InputError, match=sentence):
        match(table, root, ["a.png"])


def test_an_empty_table_is_refused(root: Path) -> None:
    (root / "t.csv").write_text("file,kind\n")
    with pytest.raises(
        InputError, match=r"in any row: it has no row, and the first image is a\.png"
    ):
        match(root / "t.csv", root, ["a.png"])


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a//b.png", "a/b.png"),
        ("a/.", "a"),
        ("a/", "a"),
        ("a/./b", "a/b"),
        ("a/..", "."),
        ("a.", "a."),
        (".\\a\\b.png", "a/b.png"),
        ("a/../b.png", "b.png"),
        ("", ""),
    ],
)
def test_paths_are_cleaned(text: str, path: str) -> None:
    assert clean_path(text) == path
