"""Numbers and names of classes."""

import numpy as np
import pytest

from codegrid.data.labels import SORTED, ClassTable, check_classes, display_classes, order_names
from codegrid.engine.errors import InputError


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["1", "10", "2"], ["1", "2", "10"]),
        (["-1", "0", "03", "3"], ["-1", "0", "03", "3"]),
        (["10", "2", "cats"], ["10", "2", "cats"]),
        (["class10", "class2"], ["class10", "class2"]),
        (["Zebra", "ant"], ["Zebra", "ant"]),
        (["2024_01", "2023_12"], ["2023_12", "2024_01"]),
        ([""], [""]),
    ],
)
def test_names_that_are_all_numbers_are_ordered_as_numbers(
    names: list[str], ordered: list[str]
) -> None:
    assert order_names(names) == ordered


def test_version_0_1_ordered_all_names_as_text() -> None:
    assert order_names(["1", "2", "10"], SORTED) == ["1", "10", "2"]


def test_classes_that_have_numbers_keep_them_and_new_ones_follow() -> None:
    assert order_names(["ants", "cats", "dogs"], ["dogs", "eels", "cats"]) == [
        "dogs",
        "eels",
        "cats",
        "ants",
    ]


def test_labels_with_holes_are_numbered_densely_and_called_by_their_labels() -> None:
    train, val = np.array([7, 20_000_000, 7]), np.array([3, -1])
    table = ClassTable.of([], train, val)
    assert table.names == ["3", "7", "20000000"]
    assert table.number(train, "images").tolist() == [1, 2, 1]
    assert table.number(val, "images").tolist() == [0, -1]
    assert not table.is_dense


def test_labels_of_names_are_their_own_numbers_and_further_labels_follow() -> None:
    table = ClassTable.of(["cats", "dogs", "eels"], np.array([0, 2]))
    assert (table.names, table.is_dense) == (["cats", "dogs", "eels"], True)
    assert table.number(np.array([2, 0, -1]), "images").tolist() == [2, 0, -1]
    beyond = ClassTable.of(["cats"], np.array([0, 9]))
    assert (beyond.names, beyond.labels) == (["cats", "9"], [0, 9])


@pytest.mark.parametrize("label", [4, 8, 99, -2])
def test_a_label_that_was_not_learned_is_refused(label: int) -> None:
    table = ClassTable.of([], np.array([3, 7]))
    with pytest.raises(InputError, match=f"images of x have the label {label}, which is none of"):
        table.number(np.array([3, label]), "images of x")


def test_a_class_is_known_by_number_or_name() -> None:
    table = ClassTable(["1", "2", "10"], [0, 1, 2])
    assert [table.find(label) for label in (0, 2, -1, "10", "2")] == [0, 2, -1, 2, 1]
    assert [table.find(label) for label in (3, -2, "3", True)] == [None] * 4


@pytest.mark.parametrize("classes", ["cats", ["cats", "cats"], [1, "1"]])
def test_names_that_are_no_list_or_not_different_are_refused(classes: object) -> None:
    with pytest.raises(InputError, match=r"^data\.classes"):
        check_classes(classes)


def test_names_are_text_whatever_a_command_makes_of_them() -> None:
    assert check_classes([1, 2.5, True, None]) == ["1", "2.5", "true", "null"]
    assert check_classes([]) is None
    assert check_classes(SORTED) == SORTED


def test_of_many_classes_the_first_are_shown() -> None:
    assert display_classes(["cats", "dogs"]) == "0=cats, 1=dogs"
    assert display_classes([str(i) for i in range(1000)]).endswith("19=19 and 980 more")
