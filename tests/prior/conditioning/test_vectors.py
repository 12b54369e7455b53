"""Vectors as a condition: what a command and a script may give, and what a file holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from prior.conditioning.vectors import (
    VectorCondition,
    VectorPart,
    describe_column,
    load_vectors,
)
from tests.helpers.priors import PRIORS, build_prior

NAN = float("nan")
SITES = ["Bonn", "Ulm", "7"]


def table() -> VectorCondition:
    """A number, a vector of two and one of three names."""
    parts = [VectorPart("age", 1), VectorPart("size", 2), VectorPart("site", 3, SITES)]
    return VectorCondition(parts, of_columns=True)


def file() -> VectorCondition:
    return VectorCondition([VectorPart("vector", 3)], of_columns=False)


def same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2, 3], [4, None, 6]], [[1, 2, 3], [4, NAN, 6]]),
        ((1.5, 2, 3), [[1.5, 2, 3]]),
        (np.arange(6).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
        (torch.ones(1, 3, dtype=torch.bfloat16), [[1, 1, 1]]),
    ],
)
def test_vectors_come_as_lists_arrays_and_tensors(value: Any, expected: Any) -> None:
    read = file().read(value)
    assert read.dtype == torch.float32
    assert same(read, expected)


def test_numbers_of_a_vector_of_one_are_one_each() -> None:
    one = VectorCondition([VectorPart("age", 1)], of_columns=True)
    assert same(one.read([20, 30, None]), [[20], [30], [NAN]])
    assert same(one.read(5), [[5]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"age": 40}, [[40, NAN, NAN, NAN, NAN, NAN]]),
        ({"site": "Ulm", "age": 40}, [[40, NAN, NAN, 0, 1, 0]]),
        ({"site": 7}, [[NAN, NAN, NAN, 0, 0, 1]]),
        ({"size": [1, 2]}, [[NAN, 1, 2, NAN, NAN, NAN]]),
        (
            {"site": ["Bonn", None], "age": 1},
            [[1, NAN, NAN, 1, 0, 0], [1, NAN, NAN, NAN, NAN, NAN]],
        ),
        ({"age": [1, 2], "site": ["Ulm", "Ulm"]}, [[1, NAN, NAN, 0, 1, 0], [2, NAN, NAN, 0, 1, 0]]),
    ],
)
def test_columns_are_named_and_those_left_out_are_missing(value: Any, expected: Any) -> None:
    assert same(table().read(value), expected)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([1, 2], "condition has vectors of shape 1x2, and this prior learned vectors of 3 numbers"),
        ([[[1, 2, 3]]], "condition has vectors of shape 1x1x3"),
        ("red", "condition=red is no vector; give 3 numbers as .0.5,2., a .npy file"),
        (["a", "b", "c"], "must be numbers; this prior learned vectors of 3 numbers"),
        ([[1, 2], [1, 2, 3]], "must be numbers"),
        ([1, 2, np.inf], "condition has infinite numbers; give finite ones"),
        ([1, 2, 1e300], "condition has infinite numbers"),
        ("gone.npy", "condition=gone.npy is not there; give a .npy or .npz file"),
        ({"age": 3}, "must be numbers"),
    ],
)
def test_what_is_no_vector_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        file().read(value)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"ago": 3}, "condition.ago is none of the columns that were learned, did you mean age"),
        (
            {"site": "Köln"},
            "condition.site=Köln is none of the names that were learned; there is Bonn",
        ),
        ({"site": "Bon"}, "did you mean Bonn"),
        ({"age": "old"}, "condition.age=old must be numbers; this prior learned 1 number"),
        ({"age": [1, 2, 3], "site": ["Ulm", "Bonn"]}, "columns of 2 and 3 values"),
        ([1], "learned vectors of 6 numbers: age .1., size .2., site .3."),
    ],
)
def test_columns_that_are_none_are_refused(value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        table().read(value)


def test_samples_take_conditions_in_turn_and_none_is_missing_throughout() -> None:
    condition, model = file(), build_prior(PRIORS["gpt"])
    condition.attach(model)
    chosen = condition.choose(model, [[1, 2, 3], [4, 5, 6]], 3)
    assert same(chosen, [[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    assert condition.choose(model, "none", 2).isnan().all()
    with pytest.raises(InputError, match="conditioned on vectors of 3 numbers; give condition="):
        condition.choose(model, None, 2)
    with pytest.raises(InputError, match="condition is an empty list"):
        condition.choose(model, np.empty((0, 3)), 2)


def test_the_condition_is_described_and_built_again() -> None:
    for condition in (table(), file()):
        again = VectorCondition.from_description(condition.describe())
        assert again.describe() == condition.describe()
        assert again.columns == condition.columns
    assert table().columns == ["age", "size", "site"]
    assert file().columns == []


def test_mean_and_deviation_are_of_the_numbers_that_are_there() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal([1e6, -3, 0], [2.0, 1e-3, 5], (9000, 3)).astype(np.float32)
    vectors[random.random(vectors.shape) < 0.3] = np.nan
    vectors[:, 1] = 4
    condition = file()
    condition.fit(vectors)
    expected = np.nanmean(vectors.astype(np.float64), 0), np.nanstd(vectors.astype(np.float64), 0)
    assert np.allclose(condition.mean, expected[0], rtol=1e-5)
    assert np.allclose(condition.deviation[[0, 2]], expected[1][[0, 2]], rtol=1e-3)
    assert condition.deviation[1] == 1, "a constant is not scaled"
    condition.fit(np.full((3, 3), np.nan, np.float32))
    assert (condition.mean.tolist(), condition.deviation.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_text_becomes_a_number_for_each_name() -> None:
    part = describe_column("site", np.array([0, 1, -1]), SITES)
    assert same(part.encode(np.array([2, -1, 0, 5])), [[0, 0, 1], [NAN] * 3, [1, 0, 0], [NAN] * 3])
    assert same(
        describe_column("age", np.zeros(4), None).encode(np.array([1.0, NAN])), [[1], [NAN]]
    )
    with pytest.raises(InputError, match="condition=caption is a column of 1,001 different texts"):
        describe_column("caption", np.zeros(3), [str(i) for i in range(1001)])


def test_a_file_holds_vectors_and_perhaps_names(tmp_path: Path) -> None:
    vectors = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.save(tmp_path / "a.npy", vectors)
    np.savez(tmp_path / "b.npz", vectors=vectors, names=["x.png", "y.png"])
    np.save(tmp_path / "c.npy", vectors[:, 0])
    assert np.array_equal(load_vectors(tmp_path / "a.npy", "").vectors, vectors)
    assert load_vectors(tmp_path / "b.npz", "").names == ["x.png", "y.png"]
    np.savez(tmp_path / "b.npz", vectors=vectors, names=np.array([b"x.png", b"y.png"]))
    assert load_vectors(tmp_path / "b.npz", "").names == ["x.png", "y.png"]
    assert load_vectors(tmp_path / "c.npy", "").vectors.shape == (2, 1)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.zeros((2, 3))}, "has the arrays x, and needs vectors"),
        ({"vectors": np.zeros((2, 3, 1))}, r"an array of shape \[2, 3, 1\] and type float64"),
        ({"vectors": np.array([["a"]])}, "give .images, size. numbers"),
        ({"vectors": np.zeros((2, 3)), "names": ["a"]}, "has 1 names for 2 vectors"),
    ],
)
def test_a_file_of_other_arrays_is_refused(
    tmp_path: Path, arrays: dict[str, Any], sentence: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        load_vectors(tmp_path / "a.npz", "condition=a.npz")


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_is_refused_and_runs_no_code(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match="can't be read as an array"):
        load_vectors(tmp_path / "a.npy", "condition=a.npy")
    file = tmp_path / "c.npz"
    np.savez_compressed(file, vectors=np.random.default_rng(0).standard_normal((40, 30)))
    whole = file.read_bytes()
    for damaged in (b"PK\x03\x04", whole[:200], whole[:200] + bytes(100) + whole[300:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="can't be read as an array"):
            load_vectors(file, "condition=c.npz")
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object))
    with pytest.raises(InputError, match="can't be read as an array"):
        load_vectors(tmp_path / "b.npy", "condition=b.npy")
