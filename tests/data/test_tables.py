"""Tables in files, and the arrays that their columns become."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codegrid.data.tables import (
    Column,
    ColumnValues,
    clean_labels,
    convert_columns,
    open_table,
)
from codegrid.engine.errors import InputError


def write(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


def read(file: Path, *names: str) -> list[ColumnValues]:
    return open_table(file, f"data.labels={file.name}", names).read(names)


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def convert(texts: list[str], entry: str = "age", **settings: Any) -> Column:
    [column] = convert_columns([texts], entry, f"{entry} of t.csv", **settings)
    return column


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("t.csv", "file,kind\na.png,cat\nb.png,dog\n", "utf-8"),
        ("bom.csv", "file,kind\na.png,cat\nb.png,dog\n", "utf-8-sig"),
        ("excel.csv", "file;kind\na.png;cat\nb.png;dog\n", "utf-8"),
        ("unicode.txt", "file\tkind\na.png\tcat\nb.png\tdog\n", "utf-16"),
        ("t.tsv", "file\tkind\na.png\tcat\nb.png\tdog", "utf-8"),
        ("windows.csv", "file,kind\r\na.png,cat\r\nb.png,dog\r\n\r\n", "utf-8"),
        (
            "spaces.csv",
            ' file , kind \na.png , cat\n"b.png", "dog" \n'.replace('" \n', '"\n'),
            "utf-8",
        ),
        ("more.csv", "n,x;y,file,kind\n1,2,a.png,cat\n2,3,b.png,dog\n", "utf-8"),
    ],
)
def test_a_table_of_text_is_read_as_it_is_written_everywhere(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    table = write(tmp_path / name, text, encoding)
    assert read(table, "file", "kind") == [["a.png", "b.png"], ["cat", "dog"]]
    assert read(table, "kind") == [["cat", "dog"]]


def test_a_field_in_quotes_may_hold_anything(tmp_path: Path) -> None:
    fields = ["a, b", 'say "a"', "two\nlines", "ä"]
    with (tmp_path / "t.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([["file", "kind"], *(["x.png", field] for field in fields)])
    assert read(tmp_path / "t.csv", "kind") == [fields]


def test_the_columns_that_settings_name_decide_on_the_delimiter(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "file;size, in mm;kind\na.png;1,5;cat\n")
    assert read(table, "kind", "size, in mm") == [["cat"], ["1,5"]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"^data\.labels=t\.csv is empty; its first line must name its columns"),
        (b"file,kind\na,b\nc\n", r"^line 3 of .*t\.csv has 1 fields, and the first line names 2 columns; a field that"),
        (b"file,kind\na,b,c\n", r"^line 2 of .* has 3 fields"),
        (b"file,kind\n\xe4.png,b\n", r"is not UTF-8 text \(.*\); save it as CSV UTF-8$"),
        (b'file,kind\na,"b\n', r"can't be read near line 2 \(unexpected end of data\); correct its quotes$"),
        (b"file,kind,kind\na,b,c\n", r"has 2 columns kind, and data\.label=kind means one"),
        (b"file,kinds\na,b\n", r"^data\.label=kind is not a column of .*, did you mean kinds\? there is file, kinds$"),
        (b"file,x\na,b\n", r"^data\.label=kind is not a column of .*t\.csv; there is file, x$"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_gets_a_sentence(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        table = open_table(tmp_path / "t.csv", "data.labels=t.csv", ["kind"])
        table.check_column("data.label", "kind")
        table.read(["kind"])


def test_of_many_columns_ten_are_named(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", ",".join(f"c{i}" for i in range(40)))
    with pytest.raises(InputError, match=r"there is c0, .*, c9 and 30 more$"):
        open_table(table, "data.labels=t.csv", ["kind"]).check_column("data.label", "kind")


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^data\.labels=t\.xlsx must be a table that ends with \.csv"
    ):
        open_table(write(tmp_path / "t.xlsx", ""), "data.labels=t.xlsx", [])


def test_a_parquet_file_reads_as_the_csv_file_of_the_same_table(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "file": ["a.png", "b.png", "c.png"],
        "kind": pa.array(["cat", None, " dog"]).dictionary_encode(),
        "n": [1, None, 10],
        "x": [0.5, 1.0, float("nan")],
        "flag": [True, False, None],
        "a.b": ["x", "y", "z"],
    }
    texts = (
        "file,kind,n,x,flag,a.b\na.png,cat,1,0.5,True,x\nb.png,,,1.0,False,y\nc.png,dog,10,,,z\n"
    )
    parquet = read(write_parquet(tmp_path / "t.parquet", **columns), *columns)
    assert parquet == read(write(tmp_path / "t.csv", texts), *columns)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 2), pa.large_list(pa.int16())]
)
def test_lists_are_vectors_and_none_is_not_a_number(tmp_path: Path, kind: Any) -> None:
    vectors = pa.array([[1, 2], None, [3, 4]], kind)
    [values] = read(write_parquet(tmp_path / "t.parquet", v=vectors), "v")
    expected = [[1, 2], [np.nan, np.nan], [3, 4]]
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([[1.0], [1.0, 2.0]], r"the column v of .*t\.parquet holds lists of 1 to 2 numbers"),
        (
            [b"x", b"y"],
            r"the column v of .*t\.parquet holds binary, and a column must hold text, numb",
        ),
        ([["x"], ["y"]], r"holds list<.*string>, and a column must"),
    ],
)
def test_columns_of_other_things_are_refused(
    tmp_path: Path, values: list[Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        read(write_parquet(tmp_path / "t.parquet", v=values), "v")


def test_a_damaged_parquet_file_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^data\.labels=t\.parquet can't be read as a parquet file"
    ):
        read(write(tmp_path / "t.parquet", "no table"), "v")


def test_parquet_without_its_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "t.parquet", v=[1])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        InputError, match=r'needs the library pyarrow; pip install "codegrid\[tables\]"'
    ):
        read(file, "v")


def test_the_first_rows_are_the_same_in_both_formats(tmp_path: Path) -> None:
    texts = [str(i) for i in range(50)]
    write(tmp_path / "t.csv", "file\n" + "\n".join(texts))
    write_parquet(tmp_path / "t.parquet", file=texts)
    for name in ("t.csv", "t.parquet"):
        assert open_table(tmp_path / name, name, []).read(["file"], 7) == [texts[:7]]
    write_parquet(tmp_path / "empty.parquet", file=pa.array([], pa.string()))
    assert open_table(tmp_path / "empty.parquet", "", []).read(["file"], 7) == [[]]


def test_numbers_become_float32_and_an_empty_cell_is_not_a_number() -> None:
    column = convert(["1", "", "-2.5", "1e3"])
    assert (column.values.dtype, column.names, column.missing) == (np.float32, None, 1)
    np.testing.assert_array_equal(column.values, [1, np.nan, -2.5, 1000])


def test_text_becomes_the_places_of_its_names() -> None:
    column = convert(["rome", "", "oslo", "rome"])
    assert (column.values.dtype, column.values.tolist()) == (np.int64, [1, -1, 0, 1])
    assert (column.names, column.missing) == (["oslo", "rome"], 1)


def test_names_that_a_run_recorded_keep_their_numbers_and_new_ones_follow() -> None:
    column = convert(["rome", "bern", "oslo"], names=["oslo", "rome"])
    assert (column.values.tolist(), column.names) == ([1, 2, 0], ["oslo", "rome", "bern"])


def test_numbers_are_names_if_the_setting_says_so_or_if_they_are_codes() -> None:
    assert convert(["10", "2"], "site:text").names == ["2", "10"]
    assert convert(["007", "12"]).names == ["007", "12"]
    assert convert(["0.5", "0", "-0.25"]).names is None


@pytest.mark.parametrize("text", ["[1, -2.5, 3e2]", "[1 -2.5 300]", "[ 1.,-2.5,  300.0 ]"])
def test_a_list_in_brackets_becomes_a_vector(text: str) -> None:
    column = convert([text, "", text])
    np.testing.assert_array_equal(column.values[[0, 2]], [[1, -2.5, 300]] * 2)
    assert (column.values.dtype, column.missing) == (np.float32, 1)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["20231235", "5"], r"has 20231235, which 32-bit numbers don't hold exactly; data\.columns=\[age:text\] takes"),
        (["1e39"], r"the column age of t\.csv has 1e\+39, which is no finite 32-bit number"),
        (["inf"], r"has inf, which is no finite"),
        (["[1, x]"], r"has \[1, x\], which is no list of numbers"),
        (["[1]", "[1, 2]"], r"holds lists of 1 to 2 numbers"),
    ],
)  # fmt: skip
def test_numbers_that_would_change_are_refused(texts: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        convert(texts)


def test_a_large_number_with_a_point_may_be_rounded() -> None:
    assert convert(["20231234.5"]).values[0] == np.float32(20231234.5)


def test_the_parts_of_a_column_are_of_one_kind() -> None:
    numbers, text = convert_columns([["1", "2"], ["x"]], "c", "c of t.csv")
    assert numbers.names == text.names == ["1", "2", "x"]
    assert (numbers.values.tolist(), text.values.tolist()) == ([0, 1], [2])


def test_whole_numbers_that_a_program_wrote_with_a_point_are_whole_again() -> None:
    assert clean_labels(["1.0", "", "10.0", "-2.00"]) == ["1", "", "10", "-2"]
    assert clean_labels(["1.0", "1.5"]) == ["1.0", "1.5"]
