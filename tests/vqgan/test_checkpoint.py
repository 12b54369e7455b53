import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from tests.test_house import config
from vqgan.checkpoint import FORMAT, find, header, load_tokenizer, part, read, save_whole, tokenizer_from

SMALL = ["stage=vqgan", "data.image_size=16", "model.grid=4", "model.width=8", "quantizer.K=16", "quantizer.dim=8"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoint of an untrained tokenizer."""
    chosen = config(*SMALL)
    tokenizer = tokenizer_from(chosen)
    state = {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    save(tmp_path, {"codegrid": header("vqgan", chosen), "state_dict": state})
    return tmp_path


def save(folder: Path, content: Any) -> None:
    save_whole(content, folder / "checkpoints" / "last.ckpt")


def test_a_tokenizer_comes_back_from_its_run_folder_and_from_its_file(run: Path) -> None:
    by_folder, chosen = load_tokenizer(run)
    by_file, _ = load_tokenizer(run / "checkpoints" / "last.ckpt")
    assert by_folder.fingerprint() == by_file.fingerprint()
    assert by_folder.grid == (4, 4)
    assert not by_folder.training
    assert chosen["data"]["image_size"] == 16


def test_the_stored_config_is_plain_and_resolved(run: Path) -> None:
    stored = read(run, "vqgan")["codegrid"]["config"]
    assert type(stored) is dict
    assert stored["model"]["encoder"]["image_size"] == 16


def test_missing_weights_are_an_error(run: Path) -> None:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"].popitem()
    save(run, content)
    with pytest.raises(InputError, match="Missing key"):
        load_tokenizer(run)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_file_is_named(run: Path, damage: bytes | None) -> None:
    file = run / "checkpoints" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(InputError, match=r"last\.ckpt is damaged or no checkpoint"):
        read(run, "vqgan")


def test_a_checkpoint_of_something_else_is_refused(run: Path) -> None:
    save(run, {"state_dict": {}})
    with pytest.raises(InputError, match="no checkpoint of Codegrid"):
        read(run, "vqgan")


def test_loading_runs_no_code_of_the_file(run: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {run}/executed",)

    (run / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps({"codegrid": Malicious()}, protocol=2))
    with pytest.raises(InputError):
        read(run, "vqgan")
    save(run, {"codegrid": Malicious()})
    with pytest.raises(InputError):
        read(run, "vqgan")
    assert not (run / "executed").exists()


def test_the_wrong_stage_is_refused_with_the_right_one(run: Path) -> None:
    with pytest.raises(InputError, match="comes from stage=vqgan, and a checkpoint of stage=prior is needed"):
        read(run, "prior")


def test_a_newer_format_is_refused(run: Path) -> None:
    save(run, {"codegrid": {"format": FORMAT + 1, "stage": "vqgan"}})
    with pytest.raises(InputError, match="update Codegrid"):
        read(run, "vqgan")


def test_a_run_folder_means_its_best_checkpoint_where_it_keeps_one(run: Path) -> None:
    assert find(run).name == "last.ckpt"
    (run / "checkpoints" / "best.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    assert find(run).name == "best.ckpt"
    assert find(run / "checkpoints" / "last.ckpt").name == "last.ckpt"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checkpoint"):
        find(tmp_path)


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    save_whole({"a": 1}, file)
    with pytest.raises(Exception, match="pickle"):
        save_whole({"a": lambda: 0}, file)
    assert torch.load(file, weights_only=True) == {"a": 1}


def test_part_takes_a_prefix_and_nothing_that_begins_alike() -> None:
    assert part({"a.x": 1, "ab.x": 2, "b": 3}, "a") == {"x": 1}
