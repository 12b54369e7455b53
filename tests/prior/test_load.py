"""A prior's run folder stands by itself, wherever it and its tokenizer's run have moved."""

from pathlib import Path

import pytest

from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.errors import InputError
from codegrid.engine.folder import append_record
from prior.load import TOKENIZER_COPY, find_tokenizer, move_images


def save_run(file: Path, run_id: str) -> Path:
    save_atomically({"codegrid": make_header("vqgan", {"id": run_id})}, file)
    return file


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """The folder of a prior's run whose tokenizer is of the run a1."""
    return save_run(tmp_path / "prior" / TOKENIZER_COPY, "a1").parent


def test_a_new_run_has_the_tokenizer_that_ckpt_names(tmp_path: Path) -> None:
    assert find_tokenizer("x", None) == "x"
    assert find_tokenizer("x", tmp_path) == "x", "a run that broke off before it had a copy"


@pytest.mark.parametrize("ckpt", ["gone", "runs/vqgan/gone"])
def test_a_resumed_run_needs_no_other_folder(
    resumed: Path, ckpt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_tokenizer(ckpt, resumed) == resumed / TOKENIZER_COPY
    assert f"ckpt={ckpt} can't be read: {resumed} resumes with its copy" in capsys.readouterr().err


def test_the_tokenizer_may_be_named_in_its_new_place_but_not_another(
    resumed: Path, tmp_path: Path
) -> None:
    same = save_run(tmp_path / "moved/checkpoints/last.ckpt", "a1").parents[1]
    assert find_tokenizer(str(same), resumed) == resumed / TOKENIZER_COPY
    other = save_run(tmp_path / "other/checkpoints/last.ckpt", "b2").parents[1]
    with pytest.raises(InputError, match=r"ckpt=.*other is the run b2.*leave ckpt out"):
        find_tokenizer(str(other), resumed)


def test_a_damaged_copy_gives_way_to_ckpt_of_the_same_run(resumed: Path, tmp_path: Path) -> None:
    (resumed / TOKENIZER_COPY).write_bytes(b"half")
    assert find_tokenizer("x", resumed) == "x"
    append_record(resumed, {"of": "a1"}, None)
    other = save_run(tmp_path / "other.ckpt", "b2")
    with pytest.raises(InputError, match="learned the codes of the tokenizer a1; name that one"):
        find_tokenizer(str(other), resumed)


def test_the_images_are_where_the_prior_had_them_and_read_as_the_tokenizer_did() -> None:
    data = {"root": "/old", "val_root": None, "cache": "disk", "cache_dir": "c", "n_val": 4}
    named = {"root": "/new", "val_root": None, "cache": "ram", "cache_dir": "d", "path": "x"}
    assert move_images(data, named) == {**data, "root": "/new"}
    assert move_images(data, {}) == data
