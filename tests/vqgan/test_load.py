"""Later stages take a tokenizer's images from its run, in the places where they are now."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException

from codegrid.data.folder import Folder
from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.errors import InputError
from codegrid.engine.folder import append_record
from tests.helpers.configs import compose_config, compose_plain
from vqgan.load import load_images


def describe_data(name: str, *words: str) -> dict[str, Any]:
    """The `data` group of a run's config."""
    data: dict[str, Any] = compose_plain("stage=vqgan", f"data={name}", *words)["data"]
    return data


def places(*words: str) -> Any:
    """What a later stage says about the images."""
    return compose_config("stage=prior", "ckpt=x", *words).data


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """The folder of a run on the photos."""
    save_atomically({"codegrid": make_header("vqgan", {})}, tmp_path / "run/checkpoints/last.ckpt")
    images = load_images(training(photos), {}, tmp_path / "run")
    append_record(tmp_path / "run", {}, images.describe())
    images.record_images(tmp_path / "run")
    return tmp_path / "run"


def training(photos: Path) -> dict[str, Any]:
    cache = f"cache_dir={photos.parent / 'cache'}"
    return describe_data(
        "folder", f"data.root={photos}", "data.n_val=4", "data.image_size=16", cache
    )


def test_moved_images_are_the_same_ones(
    photos: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, moved = training(photos), str(photos.with_name("moved"))
    photos.rename(moved)
    with pytest.raises(InstantiationException, match="data.root=.*photos is not a folder"):
        load_images(data, places(), folder)
    images = load_images(
        data, places(f"data.root={moved}", f"cache_dir={folder}", "data.cache=ram"), folder
    )
    assert isinstance(images, Folder)
    assert (str(images.root), images.cache_dir, images.cache) == (moved, str(folder), "ram")
    assert capsys.readouterr().err == ""


def test_other_images_are_named(
    photos: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "dogs" / "new.png").write_bytes((photos / "cats" / "0.png").read_bytes() + b" ")
    load_images(training(photos), places(), folder)
    assert "1 added, as dogs/new.png" in capsys.readouterr().err


def test_validation_images_in_a_folder_of_their_own_can_move(photos: Path, folder: Path) -> None:
    held = photos.with_name("held")
    shutil.copytree(photos, held)
    for file in held.rglob("*.png"):
        file.write_bytes(file.read_bytes() + b" ")
    images = load_images(training(photos), places(f"data.val_root={held}"), folder)
    assert images.size("val") == 16


@pytest.mark.parametrize(
    ("name", "word", "sentence"),
    [
        (
            "shapes",
            "data.root=x",
            "these settings can: data.cache, data.cache_dir, data.num_workers",
        ),
        ("hf", "data.train=x", "these settings can: data.path, data.files, "),
        ("mnist", "data.val_root=x", "did you mean data.root?; these"),
        (
            "folder",
            "++data.image_size=8",
            "data.image_size can't change for the images",
        ),
        ("litdata", "++data.roots=x", "these settings can: data.train, data.val, "),
    ],
)
def test_a_setting_that_is_no_place_of_the_images_is_refused(
    name: str, word: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load_images(describe_data(name), places(word), tmp_path)
    assert sentence in str(caught.value)


def test_a_sentence_about_the_images_advises_what_the_command_takes(
    photos: Path, folder: Path
) -> None:
    few = photos.with_name("few")
    few.mkdir()
    shutil.copy(photos / "cats" / "0.png", few)
    with pytest.raises(
        InputError, match=r"data\.n_val=4 must leave.*can only say where they are: data\.root"
    ):
        load_images(training(photos), places(f"data.root={few}"), folder)


def test_an_incomplete_copy_does_not_advise_to_hold_images_out(
    tmp_path: Path, photos: Path
) -> None:
    data = describe_data("ffhq", f"data.root={photos}")
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        file.rename(photos / f"{number:05d}.png")
    with pytest.raises(
        InputError, match=r"hold out some of them.*; but this command.*data\.root, "
    ):
        load_images(data, places(), tmp_path)


def test_a_resumed_prior_keeps_to_its_images(photos: Path, folder: Path) -> None:
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        file.write_bytes(file.read_bytes() + b" " * number)
    load_images(training(photos), places(), folder)
    with pytest.raises(
        InputError, match="of the same name with another content.*say where its own"
    ):
        load_images(training(photos), places(), "gone", resumes=folder)
