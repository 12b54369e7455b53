"""The classes of a prior: their numbers, their names, and how a command names them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codegrid.data.labels import ClassTable
from codegrid.data.pixels import PixelRules
from codegrid.data.samples import ArraySamples
from codegrid.data.shapes import Shapes
from codegrid.engine.errors import InputError
from prior.conditions import choose_labels, encode_init_image
from prior.load import prior_header, read_classes
from prior.training import list_classes
from tests.helpers.images import make_images
from tests.helpers.stage1 import make_tokenizer
from vqgan.load import read_rules

ANIMALS = ClassTable(["cats", "dogs", "sea lions"], [0, 1, 2])
NUMBERED = ClassTable(["1", "2", "10"], [0, 1, 2])


def codes(labels: list[int]) -> ArraySamples:
    return ArraySamples(np.zeros((len(labels), 2, 2), np.uint16), np.array(labels))


class Unnamed:
    """Images whose labels have no names."""

    classes: list[str] = []
    title = "ids"


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("dogs", [1, 1, 1, 1]),
        ("sea lions", [2, 2, 2, 2]),
        (["dogs", "cats"], [1, 0, 1, 0]),
        (["dogs", 2, -1], [1, 2, -1, 1]),
        (2, [2, 2, 2, 2]),
        (None, [0, 1, 2, 0]),
    ],
)
def test_classes_are_named_or_numbered(label: Any, expected: list[int]) -> None:
    labels = choose_labels(ANIMALS, label, 4)
    assert labels is not None
    assert labels.tolist() == expected


def test_a_number_is_a_class_and_the_text_of_a_number_is_its_name() -> None:
    for label, expected in ((2, 2), ("2", 1), ("10", 2), (0, 0)):
        labels = choose_labels(NUMBERED, label, 1)
        assert labels is not None
        assert labels.tolist() == [expected]


@pytest.mark.parametrize(
    ("table", "label", "hint"),
    [
        (ANIMALS, "cat", r"label=cat is no class, did you mean cats\? give numbers from 0 to 2"),
        (ANIMALS, ["cats", "sealions"], "label=sealions is no class, did you mean sea lions"),
        (ANIMALS, 3, "label=3 is no class; .*: 0=cats, 1=dogs, 2=sea lions$"),
        (ANIMALS, [], r"label=\[\] names no class; give one, or leave label out for all in turn"),
        (ANIMALS, "DOG", r"label=DOG is no class, did you mean dogs\? give"),
        (NUMBERED, 10, "label=10 is no class; the class called 10 has the number 2"),
        (ANIMALS, [0, True], "label=True is no class"),
    ],
)
def test_a_class_that_is_none_is_refused_with_those_that_are(
    table: ClassTable, label: Any, hint: str
) -> None:
    with pytest.raises(InputError, match=hint):
        choose_labels(table, label, 4)


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (["False", "True"], True, 1),  # a command line reads label=true so
        (["0.25", "1.50"], 1.5, 1),
        (["0.25", "1.50"], "1.50", 1),
        (["none", "null"], [None], 1),
        (["caf\u00e9", "bar"], "cafe\u0301", 0),  # composed and decomposed
        (["cafe\u0301", "bar"], "caf\u00e9", 0),
        (["true", "TRUE"], True, None),
        (["1.5", "1.50"], 1.5, None),
    ],
)
def test_a_name_that_a_command_line_takes_for_another_kind_of_value_is_the_class(
    names: list[str], label: Any, expected: int | None
) -> None:
    table = ClassTable(names, [0, 1])
    if expected is None:
        with pytest.raises(InputError, match=f"label={label} is no class"):
            choose_labels(table, label, 1)
    else:
        labels = choose_labels(table, label, 1)
        assert labels is not None
        assert labels.tolist() == [expected]


def test_of_many_classes_a_sentence_names_the_nearest_ten() -> None:
    names = [f"genus{i % 97} species{i}" for i in range(3000)]
    names[2000] = "Homo sapiens"
    table = ClassTable(names, list(range(3000)))
    with pytest.raises(InputError) as error:
        choose_labels(table, "homo sapien", 4)
    sentence = str(error.value)
    assert sentence.startswith("label=homo sapien is no class, did you mean Homo sapiens? give ")
    assert "of 3,000 the nearest are 2000=Homo sapiens, " in sentence
    assert sentence.count("=") == 1 + 10
    with pytest.raises(InputError, match="0=genus0 species0, .* and 2,990 more$"):
        choose_labels(table, 3000, 4)


@pytest.mark.parametrize("several", [tuple, np.array, lambda names: Column(names)])
def test_labels_come_as_any_sequence_or_column(several: Any) -> None:
    labels = choose_labels(ANIMALS, several(["dogs", "cats"]), 3)
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]


def test_thousands_of_labels_are_looked_up_at_once() -> None:
    table = ClassTable([f"class {i}" for i in range(2000)], list(range(2000)))
    wanted = [f"class {i % 2000}" for i in range(20_000)]
    labels = choose_labels(table, wanted, 20_000)
    assert labels is not None
    assert labels.tolist() == [i % 2000 for i in range(20_000)]


class Column:
    """A column of a table, as pandas has it: no sequence, but a list on request."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def tolist(self) -> list[str]:
        return self.names


def test_a_prior_without_classes_takes_no_label() -> None:
    none = ClassTable([], [])
    assert choose_labels(none, None, 4) is None
    with pytest.raises(InputError, match="label=cats needs a prior of classes"):
        choose_labels(none, "cats", 4)


def test_labels_with_holes_become_the_numbers_of_a_prior(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, val = codes([20_000_000, 40, 40]), codes([40, 7])
    images: Any = Unnamed()
    table = list_classes(images, True, train, val, None)
    assert table == ClassTable(["7", "40", "20000000"], [7, 40, 20_000_000])
    assert (train.labels.tolist(), val.labels.tolist()) == ([2, 1, 1], [1, 0])
    assert "labels are numbered: 0=7, 1=40, 2=20000000" in capsys.readouterr().err


def test_names_are_those_of_the_images_and_a_single_class_is_refused(tmp_path: Path) -> None:
    shapes = make_images(Shapes, n_train=8, n_val=4, cache_dir=str(tmp_path))
    table = list_classes(shapes, True, codes([0, 4]), codes([1]), None)
    assert table.names[:2] == ["1 shape", "2 shapes"]
    assert len(list_classes(shapes, False, codes([0, 4]), codes([1]), None)) == 0
    images: Any = Unnamed()
    with pytest.raises(InputError, match="at least two classes, and ids has 1; leave it out"):
        list_classes(images, True, codes([5, 5]), codes([5]), None)


def test_a_checkpoint_records_the_classes() -> None:
    table = ClassTable(["7", "40"], [7, 40])
    header = prior_header(make_tokenizer(), table)
    assert header["classes"] == 2
    assert read_classes(header) == table


def test_priors_of_version_0_1_call_their_classes_by_numbers() -> None:
    assert read_classes({"classes": 3}) == ClassTable(["0", "1", "2"], [0, 1, 2])


@pytest.mark.parametrize(
    ("data", "rules"),
    [
        ({"range": [0, 4095], "alpha": "ignore"}, PixelRules((0, 4095), "ignore")),
        ({"range": None, "alpha": None}, PixelRules()),
        ({}, PixelRules()),
    ],
)
def test_an_image_to_complete_is_read_as_the_tokenizers_images(
    data: dict[str, Any], rules: PixelRules, tmp_path: Path
) -> None:
    assert read_rules(data) == rules
    Image.fromarray(np.full((16, 16), 4095, np.uint16)).save(tmp_path / "slice.png")
    tokenizer = make_tokenizer().eval()
    tokenizer.rules = read_rules(data)
    _, image = encode_init_image(str(tmp_path / "slice.png"), tokenizer)
    assert int(image.max()) == (255 if data.get("range") else 15)
