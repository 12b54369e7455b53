"""Folders of images whose labels stand in a table."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from codegrid.data.folder import Folder
from codegrid.data.identity import compare_images, identify_images, save_image_ids
from codegrid.data.labelling import Labelling
from codegrid.data.layouts import FFHQ
from codegrid.data.source import FileSource, file_stamp
from codegrid.engine.errors import InputError
from codegrid.engine.folder import IMAGES, append_record
from tests.helpers.images import make_images

KINDS = ["wolf", "ant", "bear", "ant", "wolf", "", "bear", "ant"]


def save(root: Path, *files: str) -> None:
    """Write images, each of a grey that no other one has."""
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, i, 7)).save(root / file)


def write_table(path: Path, /, **columns: Any) -> Path:
    """A CSV file with these columns."""
    rows = [",".join(f'"{field}"' for field in row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([",".join(columns), *rows]) + "\n")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A flat folder of images 0.png to 7.png, and a table of them, not in their order, beside it."""
    save(tmp_path / "root", *(f"{i}.png" for i in range(8)))
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    write_table(
        tmp_path / "labels.csv",
        file=[f"{i}.png" for i in order],
        species=[KINDS[i] for i in order],
        age=["" if i == 2 else i / 2 for i in order],
        site=["rome" if i % 2 else "oslo" for i in order],
        vector=[f"[{i}, {i + 0.5}]" for i in order],
    )
    return tmp_path / "root"


def folder(root: Path, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {
        "image_size": 16,
        "n_val": 2,
        "batch_size": 4,
        "cache_dir": str(root.parent / "cache"),
        "labels": str(root.parent / "labels.csv"),
        "label": "species",
    }
    return make_images(Folder, str(root), **{**defaults, **settings})


def labels(data: Folder) -> dict[str, str]:
    """The label of each image by its name, as its samples have it."""
    by_name = {}
    for split in ("train", "val"):
        source, samples = data.source(split), data.samples(split)
        rows = range(len(source)) if samples.rows is None else samples.rows
        _, numbers = samples.__getitems__(range(len(samples)))
        for row, number in zip(rows, numbers.tolist(), strict=True):
            by_name[source.image_name(row)] = data.classes[number] if number >= 0 else ""
    return by_name


EXPECTED = {f"{i}.png": kind for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_labels_are_those_of_the_table(root: Path, cache: str) -> None:
    data = folder(root, cache=cache)
    assert data.classes == data.decisions()["classes"] == ["ant", "bear", "wolf"]
    assert labels(data) == EXPECTED
    assert data.decisions()["file_column"] == "file"


def test_a_table_among_the_images_is_no_file_that_is_left_out(root: Path) -> None:
    (root / "labels.csv").write_text((root.parent / "labels.csv").read_text())
    (root / "notes.txt").write_text("")
    data = folder(root, labels=str(root / "labels.csv"))
    assert labels(data) == EXPECTED
    assert dict(data.left_out) == {"txt": 1}


def test_numbers_are_classes_in_their_order(root: Path) -> None:
    table = write_table(root.parent / "n.csv", id=range(8), grade=[10, 2, 2, 1, 10, 1, 2, "2"])
    data = folder(root, labels=str(table), label="grade")
    assert data.classes == ["1", "2", "10"]
    assert labels(data)["0.png"] == "10"


def test_classes_that_a_run_recorded_keep_their_numbers(root: Path) -> None:
    data = folder(root, classes=["wolf", "emu", "ant"])
    assert data.classes == ["wolf", "emu", "ant", "bear"]
    assert labels(data) == EXPECTED


def test_class_folders_inside_the_root_do_not_count_beside_a_table(tmp_path: Path) -> None:
    save(tmp_path / "root", "train/a.png", "val/b.png", "c.png")
    table = write_table(
        tmp_path / "t.csv", path=["train/a.png", "val/b.png", "c.png"], k=["x", "y", "x"]
    )
    data = folder(tmp_path / "root", labels=str(table), label="k", n_val=1)
    assert labels(data) == {"train/a.png": "x", "val/b.png": "y", "c.png": "x"}


def test_columns_without_a_label_leave_the_class_folders(tmp_path: Path) -> None:
    names = [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(3)]
    save(tmp_path / "root", *names)
    table = write_table(tmp_path / "t.csv", path=names, age=range(6))
    data = folder(tmp_path / "root", labels=str(table), label=None, columns=["age"])
    assert data.classes == ["cats", "dogs"]
    assert labels(data)["dogs/1.png"] == "dogs"
    assert sorted([*data.columns("train")["age"], *data.columns("val")["age"]]) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_columns_stay_with_their_images(root: Path) -> None:
    data = folder(root, columns=["age", "site", "vector", "species"])
    assert data.column_names == {"site": ["oslo", "rome"], "species": ["ant", "bear", "wolf"]}
    for split in ("train", "val"):
        columns = data.columns(split)
        numbers = [
            int(Path(data.source(split).image_name(i)).stem) for i in range(data.size(split))
        ]
        ages = [np.nan if i == 2 else i / 2 for i in numbers]
        np.testing.assert_array_equal(columns["age"], np.array(ages, np.float32))
        np.testing.assert_array_equal(columns["vector"], [[i, i + 0.5] for i in numbers])
        assert columns["site"].tolist() == [i % 2 for i in numbers]
        assert columns["species"].tolist() == np.asarray(data.source(split).labels).tolist()
        assert {name: values.dtype.name for name, values in columns.items()} == {
            "age": "float32", "site": "int64", "vector": "float32", "species": "int64",
        }  # fmt: skip


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_columns_leave_unreadable_images_out(root: Path, cache: str) -> None:
    (root / "1.png").write_text("no image")
    data = folder(root, columns="age", n_val=1, held_out="last", on_error="skip", cache=cache)
    np.testing.assert_array_equal(
        data.columns("train")["age"], np.array([0, np.nan, 1.5, 2, 2.5, 3], np.float32)
    )


def test_the_names_of_columns_are_recorded_and_stay(root: Path) -> None:
    decided = folder(root, columns=["age", "site"]).decisions()
    assert decided["column_names"] == {"site": ["oslo", "rome"]}
    save(root, "8.png")
    with (root.parent / "labels.csv").open("a") as opened:
        opened.write('8.png,ant,4,bern,"[1, 2]"\n')
    later = folder(root, columns=["age", "site"], **decided)
    assert later.column_names == {"site": ["oslo", "rome", "bern"]}
    assert folder(root, columns=["age", "site"]).column_names["site"][0] == "bern"


def test_a_column_of_very_many_names_serves_later_commands(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.data.datamodule.MAX_RECORDED", 1)
    first = folder(root, columns=["site"])
    decided = first.decisions()
    assert decided["column_names"] == {"site": []}
    later = folder(root, columns=["site"], **decided)
    assert later.column_names == first.column_names


def test_a_column_of_numbers_that_became_text_is_refused(root: Path) -> None:
    decided = folder(root, columns=["age"]).decisions()
    text = (root.parent / "labels.csv").read_text().replace('"2.0"', '"old"')
    (root.parent / "labels.csv").write_text(text)
    with pytest.raises(
        InputError, match=r"^the column age of .* holds text, as .*, and held numbers when the run"
    ):
        folder(root, columns=["age"], **decided)


def test_a_parquet_table_labels_as_a_csv_table_does(root: Path) -> None:
    table = pa.table(
        {
            "file": [f"{i}.png" for i in range(8)],
            "species": [kind or None for kind in KINDS],
            "vector": [[float(i), i + 0.5] for i in range(8)],
        }
    )
    pq.write_table(table, root.parent / "t.parquet")
    data = folder(root, labels=str(root.parent / "t.parquet"), columns=["vector"])
    assert labels(data) == EXPECTED
    same = folder(root, columns=["vector"])
    np.testing.assert_array_equal(data.columns("train")["vector"], same.columns("train")["vector"])


def spoil(root: Path) -> None:
    """Take a file out, add two files without rows, and double two rows, one of which then differs."""
    (root / "3.png").unlink()
    save(root, "x.png", "y/z.png")
    with (root.parent / "labels.csv").open("a") as opened:
        opened.write(
            '0.png,wolf,0.0,oslo,"[0, 0.5]"\n1.png,wolf,0.5,rome,"[1, 1.5]"\n,ant,1,rome,\n'
        )


def test_rows_and_files_that_do_not_match_are_counted_and_named(root: Path) -> None:
    spoil(root)
    sentence = (
        r"labels\.csv and .*root don't match: rows without a file: 2 \(3\.png, row 12\), files without a row: 2 "
        r"\(x\.png, y/z\.png\), files of several rows: 2 \(0\.png, 1\.png\), whose rows differ: 1 \(1\.png\); "
        r"correct the table, or leave out what doesn't match with data\.mismatch=skip$"
    )
    with pytest.raises(InputError, match=sentence):
        folder(root)


def test_skip_leaves_out_what_does_not_match_and_logs_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root)
    data = folder(root, mismatch="skip", columns=["age"])
    assert labels(data) == {f"{i}.png": KINDS[i] for i in (0, 2, 4, 5, 6, 7)}
    assert (
        "rows without a file: 2 (3.png, row 12), files without a row: 2" in capsys.readouterr().err
    )
    ages = np.concatenate([data.columns(split)["age"] for split in ("train", "val")])
    assert sorted(ages[~np.isnan(ages)]) == [0, 2, 2.5, 3, 3.5]
    for split in ("train", "val"):
        source = data.source(split)
        assert isinstance(source, FileSource)
        assert source.stamps == [file_stamp(file) for file in source.files]


def test_skip_leaves_the_class_folders_of_the_rest_as_they_are(tmp_path: Path) -> None:
    names = [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(3)]
    save(tmp_path / "root", *names)
    table = write_table(tmp_path / "t.csv", path=names[1:], age=range(5))
    settings: dict[str, Any] = {"labels": str(table), "label": None, "columns": ["age"]}
    data = folder(tmp_path / "root", mismatch="skip", **settings)
    assert labels(data) == {name: name.split("/")[0] for name in names[1:]}


def test_equal_rows_of_a_file_count_as_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (root.parent / "labels.csv").open("a") as opened:
        opened.write("0.png,wolf,another age,,\n")
    with pytest.raises(
        InputError,
        match=r"files of several rows: 1 \(0\.png\), whose rows are the same, so the first",
    ):
        folder(root)
    assert labels(folder(root, mismatch="skip")) == EXPECTED
    assert "whose rows are the same" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"whose rows differ: 1 \(0\.png\)"):
        folder(root, columns=["age"])


def test_at_most_five_are_named(root: Path) -> None:
    save(root, *(f"new/{i}.png" for i in range(7)))
    with pytest.raises(
        InputError, match=r"files without a row: 7 \(new/0.png, .*, new/4.png and 2 more\);"
    ):
        folder(root)


def test_images_without_a_label_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(root)
    assert f"1 images of {root} have no species in" in capsys.readouterr().err
    table = write_table(root.parent / "n.csv", file=[f"{i}.png" for i in range(8)], k=[""] * 8)
    with pytest.raises(InputError, match=r"^data\.label=k is empty in all rows of .*: file, k$"):
        folder(root, labels=str(table), label="k")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"label": "specie"}, r"^data\.label=specie is not a column of .*, did you mean species\? there is file, species, age"),
        ({"columns": ["ages"]}, r"^data\.columns=ages is not a column of .*, did you mean age\?"),
        ({"file_column": "name"}, r"^data\.file_column=name is not a column of"),
        ({"label": None}, r"labels\.csv needs data\.label=<column> or data\.columns=\[<columns>\]; there is file, spec"),
        ({"labels": None}, r"^data\.label=species needs the table that has it; add data\.labels=<table>$"),
        ({"labels": None, "label": None, "columns": ["a", "b"]}, r"^data\.columns=\[a,b\] needs the table"),
        ({"val_labels": "v.csv"}, r"^data\.val_labels=v\.csv needs the folder of its images; add data\.val_root"),
        ({"mismatch": "keep"}, r"^data\.mismatch=keep must be one of stop, skip$"),
        ({"columns": ["age", "age:text"]}, r"^data\.columns names age twice"),
        ({"label": "vector"}, None),
        ({"labels": "nowhere.csv"}, r"^data\.labels=nowhere\.csv is not a file; say where the table is with data\.labels=<file>$"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_get_a_sentence(
    root: Path, settings: dict[str, Any], sentence: str | None
) -> None:
    if sentence is None:  # of texts that look like lists each is a class
        assert len(folder(root, **settings).classes) == 8
        return
    with pytest.raises(InputError, match=sentence):
        folder(root, **settings)


def test_a_column_of_lists_is_no_label(root: Path) -> None:
    files = [f"{i}.png" for i in range(8)]
    pq.write_table(pa.table({"file": files, "v": [[1.0]] * 8}), root.parent / "t.parquet")
    with pytest.raises(
        InputError,
        match=r"^data\.label=v is a column of lists in .*; data\.columns=\[v\] keeps them",
    ):
        folder(root, labels=str(root.parent / "t.parquet"), label="v")


def test_a_table_that_lies_in_the_root_is_named_there(root: Path) -> None:
    (root.parent / "labels.csv").rename(root / "labels.csv")
    with pytest.raises(
        InputError,
        match=rf"^data\.labels=labels\.csv is not a file; there is data\.labels={root}/labels\.csv$",
    ):
        folder(root, labels="labels.csv")


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Images train/0.png to train/3.png and val/0.png to val/1.png, and one table of both."""
    save(tmp_path, *(f"train/{i}.png" for i in range(4)), *(f"val/{i}.png" for i in range(2)))
    names = [f"train/{i}.png" for i in range(4)] + [f"val/{i}.png" for i in range(2)]
    write_table(tmp_path / "labels.csv", path=names, k=["b", "a", "b", "c", "c", "a"])
    return tmp_path


def open_splits(splits: Path, **settings: Any) -> Folder:
    return folder(splits / "train", val_root=str(splits / "val"), label="k", **settings)


def test_one_table_may_have_the_rows_of_both_folders(
    splits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_splits(splits)
    assert data.classes == ["a", "b", "c"]
    assert data.samples("train").labels.tolist() == [1, 0, 1, 2]
    assert data.samples("val").labels.tolist() == [2, 0]
    assert "has images of 2 of the 3 classes, none of b" in capsys.readouterr().err


def test_a_row_of_one_table_has_to_name_a_file_in_one_of_the_folders(splits: Path) -> None:
    with (splits / "labels.csv").open("a") as opened:
        opened.write("val/9.png,a\n")
    with pytest.raises(
        InputError, match=r"and .*train don't match: rows without a file: 1 \(val/9\.png\); correct"
    ):
        open_splits(splits)
    (splits / "val" / "1.png").unlink()
    with pytest.raises(InputError, match=r"rows without a file: 2 \(val/1\.png, val/9\.png\)"):
        open_splits(splits)


def test_a_row_that_names_a_file_in_both_folders_is_refused(splits: Path) -> None:
    table = write_table(splits / "labels.csv", path=[f"{i}.png" for i in range(4)], k=["a"] * 4)
    with pytest.raises(
        InputError,
        match=r"^2 rows of .* name images in both .*, as 0\.png; give the second a table",
    ):
        open_splits(splits)
    val = write_table(splits / "v.csv", path=["1.png", "0.png"], k=["a", ""])
    data = open_splits(splits, labels=str(table), val_labels=str(val))
    assert data.samples("val").labels.tolist() == [-1, 0]


def test_two_tables_may_name_their_files_in_two_columns(splits: Path) -> None:
    val = write_table(splits / "v.csv", image=["0.png", "1.png"], k=["a", "b"])
    data = open_splits(splits, labels=str(write_train(splits)), val_labels=str(val))
    assert data.samples("val").labels.tolist() == [0, 1]
    assert "file_column" not in data.decisions()
    assert open_splits(splits).decisions()["file_column"] == "path"


def test_a_label_that_training_lacks_is_refused(splits: Path) -> None:
    val = write_table(splits / "v.csv", path=["0.png", "1.png"], k=["a", "A"])
    with pytest.raises(
        InputError,
        match=r"v\.csv has labels for .*val that no training image has: A; write them as",
    ):
        open_splits(splits, labels=str(write_train(splits)), val_labels=str(val))


def write_train(splits: Path) -> Path:
    return write_table(
        splits / "t.csv", path=[f"{i}.png" for i in range(4)], k=["b", "a", "b", "c"]
    )


def test_a_corrected_label_decodes_no_image_again_but_is_another_key(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder(root)
    before.prepare_data()
    text = (root.parent / "labels.csv").read_text()
    (root.parent / "labels.csv").write_text(text.replace('"3.png","ant"', '"3.png","bear"'))
    monkeypatch.setattr("codegrid.data.source.FileSource.read_image", None)
    after = folder(root)
    assert labels(after) == {**EXPECTED, "3.png": "bear"}
    assert labels(before) == EXPECTED
    split = "train" if "3.png" in {after.source("train").image_name(i) for i in range(6)} else "val"
    assert after.cache_key(split)["source"] == before.cache_key(split)["source"]
    assert after.cache_key(split)["labels"] != before.cache_key(split)["labels"]
    assert identify_images(after)[split] != identify_images(before)[split]
    assert compare_images(after, root) is None  # a folder without a record


def test_another_label_is_said_of_the_images_of_a_run(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    data = folder(root, columns=["age"])
    append_record(run, {}, data.describe())
    save_image_ids(data, run)
    assert compare_images(folder(root, columns=["age"], **data.decisions()), run) is None
    text = (root.parent / "labels.csv").read_text()
    for before, after in (('"3.png","ant"', '"3.png","bear"'), ('"5.png",""', '"5.png","emu"')):
        assert before in text
        text = text.replace(before, after)
    (root.parent / "labels.csv").write_text(text)
    change = compare_images(folder(root, columns=["age"]), run)
    assert change is not None
    assert sum(split.relabelled for split in change.splits) == 2
    assert "images (1 with another label)" in str(change)
    assert change.unchanged == 1


def test_a_list_without_labels_of_an_earlier_version_is_read(root: Path, tmp_path: Path) -> None:
    data = folder(root, labels=None, label=None)
    append_record(tmp_path, {}, data.describe())
    save_image_ids(data, tmp_path)
    with np.load(tmp_path / IMAGES) as arrays:
        earlier = {name: array for name, array in arrays.items() if "labels" not in name}
    with (tmp_path / IMAGES).open("wb") as opened:
        np.savez(opened, **earlier)
    assert compare_images(data, tmp_path) is None
    change = compare_images(folder(root), tmp_path)
    assert str(change).startswith("train has 6 images (with other contents or labels")


def test_other_columns_are_another_key(root: Path) -> None:
    keys = [folder(root, columns=columns).cache_key("train") for columns in ([], ["age"], ["site"])]
    assert len({key["labels"] for key in keys}) == 3
    assert keys[0]["source"] == keys[1]["source"]


def test_a_folder_without_a_table_has_the_key_that_it_had(root: Path) -> None:
    assert "labels" not in folder(root, labels=None, label=None).cache_key("train")


def test_the_split_is_that_of_the_folder_without_its_table(root: Path) -> None:
    with_table, without = folder(root), folder(root, labels=None, label=None)
    assert with_table.source("val").names() == without.source("val").names()


def test_sources_travel_to_readers(root: Path) -> None:
    source = pickle.loads(pickle.dumps(folder(root, columns=["age"]).source("train")))
    assert source.columns["age"].dtype == np.float32


def test_the_summary_says_what_was_read(root: Path) -> None:
    summary = folder(root, columns=["age", "site", "vector"]).describe()["summary"]
    assert summary["labels"] == (
        "species, age (numbers, 1 images without), site (2 names), vector (2 numbers each) of labels.csv, "
        f"whose column file has paths below {root}"
    )
    assert summary["classes"].startswith("3: 0=ant (")


def test_a_dataset_without_tables_refuses_their_settings(root: Path) -> None:
    with pytest.raises(
        InputError, match=r"^data\.labels=t\.csv is no setting of data=x, whose labels"
    ):
        Labelling(labels="t.csv").check_supported(["columns"], "data=x")
    Labelling(columns=["a"]).check_supported(["columns"], "data=x")


def test_ffhq_takes_a_table(tmp_path: Path) -> None:
    save(tmp_path / "root", *(f"0000{i}.png" for i in range(4)))
    table = write_table(
        tmp_path / "t.csv", image=[f"0000{i}" for i in range(4)], smiles=list("yynn")
    )
    settings = {"image_size": 16, "n_val": 1, "held_out": "last", "cache_dir": str(tmp_path / "c")}
    data = make_images(FFHQ, str(tmp_path / "root"), labels=str(table), label="smiles", **settings)
    assert (data.classes, data.samples("train").labels.tolist()) == (["n", "y"], [1, 1, 0])
    assert make_images(FFHQ, str(tmp_path / "root"), **settings).classes == ["face"]
