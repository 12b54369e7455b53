import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from codegrid.data.split import Names, place_of_name, split_by_name
from codegrid.engine.errors import InputError

PATHS = [f"{kind}/{i:04d}.jpg" for kind in ("cats", "dogs", "über uns") for i in range(100)]


def sides(names: Names, n_val: int = 30, **settings: Any) -> tuple[dict[str | int, str], Any]:
    """The side of each name, and the boundary."""
    split = split_by_name(names, n_val, **{"how": "random", "seed": 0, **settings})
    rows = {"train": split.train, "val": split.val}
    return {names[row]: side for side in rows for row in rows[side].tolist()}, split.at


def changes(before: dict[str | int, str], after: dict[str | int, str]) -> list[str | int]:
    """The names that are on another side than before."""
    return [name for name, side in before.items() if after.get(name, side) != side]


@pytest.mark.parametrize("how", ["random", "last"])
@pytest.mark.parametrize("names", [PATHS, range(300)], ids=["paths", "numbers"])
def test_exactly_n_val_images_validate_and_every_image_has_one_side(how: str, names: Names) -> None:
    split = split_by_name(names, 30, how, seed=3)
    assert len(split.val) == 30
    assert sorted([*split.train, *split.val]) == list(range(300))
    assert (np.diff(split.train) > 0).all()
    assert (np.diff(split.val) > 0).all()


@pytest.mark.parametrize("how", ["random", "last"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_no_image_changes_sides_when_others_come_and_go(how: str, share: float) -> None:
    before, at = sides(PATHS, how=how)
    random = np.random.default_rng(int(10 * share))
    rest = [name for name in PATHS if random.random() < share]
    new = [f"{kind}/new-{i}.jpg" for kind in ("ants", "cats", "eels") for i in range(200)]
    after, same = sides([*new, *rest], how=how, at=at)
    assert same == at
    assert not changes(before, after)


def test_without_a_boundary_new_images_turn_no_training_image_into_a_validation_image() -> None:
    before, _ = sides(PATHS)
    after, _ = sides([*PATHS, *(f"new/{i}.jpg" for i in range(40))])
    assert {before[name] for name in changes(before, after)} <= {"val"}
    assert len(changes(before, after)) < 10


def test_about_the_same_share_of_new_images_validates() -> None:
    _, at = sides(PATHS)
    after, _ = sides([f"new/{i}.jpg" for i in range(10_000)], at=at)
    assert list(after.values()).count("val") / 10_000 == pytest.approx(at, abs=0.02)


def test_the_order_in_which_images_are_listed_does_not_matter() -> None:
    for how in ("random", "last"):
        assert sides(PATHS, how=how)[0] == sides(PATHS[::-1], how=how)[0]


def test_another_seed_holds_out_other_images() -> None:
    first, again, other = (sides(PATHS, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_places_are_uniform_and_do_not_depend_on_the_machine() -> None:
    places = [place_of_name(name, 0) for name in range(10_000)]
    assert np.histogram(places, 10, (0, 1))[0].min() > 900
    assert place_of_name("cats/0001.jpg", 0) == 0.3990907715178359  # or all splits would change


def test_a_name_has_one_place_however_its_letters_are_composed() -> None:
    name = "Füße/é.png"
    composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    assert composed != apart
    assert place_of_name(composed, 0) == place_of_name(apart, 0)


def test_a_name_that_is_no_text_has_a_place() -> None:
    assert 0 <= place_of_name(b"\xff.png".decode("utf-8", "surrogateescape"), 0) < 1


def test_last_means_the_last_in_the_order_of_the_paths() -> None:
    names = ["b/1", "a/b", "a-b/1", "c"]  # "-" comes before "/" in plain text
    assert [names[row] for row in split_by_name(names, 2, "last", 0).val] == ["b/1", "c"]


def test_a_share_can_be_asked_for() -> None:
    after, at = sides(PATHS, n_val=1000, at=0.5)
    assert at == 0.5
    assert 110 < list(after.values()).count("val") < 190


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (PATHS, {"n_val": 300}, "data.n_val=300 must leave both splits an image; there are 300"),
        (PATHS, {"n_val": 0}, "data.n_val=0 must leave both splits an image"),
        (range(4), {"n_val": 2.5}, "data.n_val=2.5 must leave both splits an image"),
        (PATHS, {"how": "first"}, "data.held_out=first must be random or last"),
        (PATHS, {"at": 2}, "data.split_at=2 must be a number from 0 to 1"),
        (PATHS, {"at": "b"}, "data.split_at=b must be a number from 0 to 1"),
        (PATHS, {"at": True}, "data.split_at=True must be a number from 0 to 1"),
        (range(9), {"at": "b", "how": "last"}, "data.split_at=b must be a whole number"),
        (PATHS[:4], {"at": 0}, "data.split_at=0 leaves none of the 4 images to validate"),
        (PATHS[:4], {"at": 1}, "data.split_at=1 leaves none of the 4 images to train on"),
        (PATHS, {"at": "ÿ", "how": "last"}, "leaves none of the 300 images to validate; give the"),
        (range(9), {"at": 9, "how": "last"}, "leaves none of the 9 images to validate"),
        ([], {"at": 9, "how": "last"}, "leaves none of the 0 images to train on"),
        ([], {"at": 0.5}, "leaves none of the 0 images to train on"),
        ([], {}, "data.n_val=30 must leave both splits an image; there are 0"),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    names: Sequence[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sides(names, **settings)
