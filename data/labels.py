"""Numbers and names of classes: what a label in the data is called, and which number a model knows it by."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.engine.errors import InputError

SORTED = "sorted"  # the value of data.classes that numbers classes as version 0.1 did
MAX_RECORDED = 10_000  # classes whose names a config records; more are probably no classes

Classes = Sequence[str] | str | None  # the setting data.classes


def check_classes(classes: Any) -> Classes:
    """data.classes as a list of names, SORTED, or None, which an empty list stands for too. Raises InputError for others."""
    if classes is None or classes == SORTED:
        return classes
    if isinstance(classes, str):
        raise InputError(
            f"data.classes={classes} must be a list of names in the order of their numbers, as [cats,dogs], "
            "or null, or sorted"
        )
    names = [_to_text(name) for name in classes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"data.classes names {min(twice)} twice; give each class a name of its own"
        )
    return names or None


def _to_text(name: Any) -> str:
    """A name that a command or config may have taken for a number, a truth value or nothing, as it was typed."""
    if name is None:
        return "null"
    return str(name).lower() if isinstance(name, bool) else str(name)


def order_names(names: Iterable[str], classes: Classes = None) -> list[str]:
    """The names of classes in the order of their numbers.

    Names that are all whole numbers are ordered as numbers, 1, 2, 10, others as text. Names that `classes` has come first,
    in its order, whether there are images of them or not. SORTED orders all as text.
    """
    unique = set(names)
    if classes is None and all(re.fullmatch(r"-?[0-9]+", name) for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    if classes is None or isinstance(classes, str):
        return sorted(unique)
    return [*classes, *order_names(unique - set(classes))]


def number_label(label: Any, numbers: Mapping[Any, int], what: str) -> int:
    """The number of a label's class, -1 for None and for empty text.

    `numbers` has it for text, and for numbers that are not their own. Raises InputError for text that is not there; `what`
    is the data that has it, for the message.
    """
    if label is None:
        return -1
    if not isinstance(label, str):
        return numbers.get(int(label), int(label))
    text = label.strip()
    if text and text not in numbers:
        raise InputError(
            f"{what} has the label {text}, which is not in data.classes, {display_classes([*map(str, numbers)], 10)}; add it "
            "there"
        )
    return numbers[text] if text else -1


@dataclass(frozen=True)
class ClassTable:
    """The classes that a model knows: their names and, in the same order, the labels that they have in the data.

    A class is known by its place in the lists. The label -1, none, stays -1.
    """

    names: list[str]
    labels: list[int]

    @classmethod
    def of(cls, names: Sequence[str], *labels: NDArray[Any]) -> "ClassTable":
        """The table for labels that have these names, in the order of the labels.

        Labels beyond the names, of data that name none or too few, are called by their numbers; if there are no names at
        all, only labels that occur are classes, so that ids with holes between them do not become millions of classes.
        """
        occurring = {int(label) for part in labels for label in np.unique(part)}
        further = sorted(label for label in occurring if label >= len(names))
        return cls(
            [*names, *map(str, further)],
            [*range(len(names)), *further],
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_dense(self) -> bool:
        """Whether labels and numbers are the same."""
        return self.labels == list(range(len(self.labels)))

    def number(self, labels: NDArray[Any], what: str) -> NDArray[np.int64]:
        """The number of each label. Raises InputError, about `what` has these labels, for one that is not in the table."""
        labels = np.asarray(labels).astype(np.int64)
        known = np.array([-1, *self.labels])
        places = np.searchsorted(known, labels).clip(max=len(known) - 1)
        if (strange := labels[known[places] != labels]).size:
            raise InputError(
                f"{what} have the label {int(strange.min())}, which is none of the {len(self):,} classes that were learned; "
                "give it the images that it was trained on, with data.root=<folder>"
            )
        return places.astype(np.int64) - 1

    def find(self, label: int | str) -> int | None:
        """The number of a class that a command names: a number, or a name; None if there is no such class."""
        if isinstance(label, str):
            return self.names.index(label) if label in self.names else None
        if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < len(self):
            return None
        return label


def display_classes(names: Sequence[str], shown: int = 20) -> str:
    """Numbers and names of classes, as 0=cats, 1=dogs; the first ones, if there are many."""
    listed = [f"{number}={name}" for number, name in enumerate(names[:shown])]
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(listed) + more
