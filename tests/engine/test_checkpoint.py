"""Checkpoint files: whole or not at all, checked before use, read without running code."""

import errno
import os
import pickle
import re
import resource
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from codegrid.engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from codegrid.engine.checkpoint import (
    check_restorable,
    find_checkpoint,
    find_resumable,
    make_header,
    read_checkpoint,
    save_atomically,
    substate,
)
from codegrid.engine.errors import InputError
from codegrid.engine.folder import BEST, DAMAGED, LAST, PREVIOUS
from codegrid.engine.version import FORMAT, VERSION
from codegrid.engine.writer import AtomicCheckpointIO
from tests.helpers.configs import SMALL, compose_plain
from tests.helpers.stage1 import fit, lightning_warnings, make_module
from vqgan.load import build_tokenizer, load_tokenizer

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoint of an untrained tokenizer."""
    config = compose_plain(*SMALL)
    tokenizer = build_tokenizer(config["model"], config["quantizer"])
    state = {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    save(tmp_path, {"codegrid": make_header("vqgan", config), "state_dict": state})
    return tmp_path


def save(folder: Path, content: Any) -> None:
    save_atomically(content, folder / LAST)


def test_a_tokenizer_is_loaded_from_its_run_folder_or_from_its_file(run: Path) -> None:
    by_folder, config = load_tokenizer(run)
    by_file, _ = load_tokenizer(run / LAST)
    assert by_folder.fingerprint() == by_file.fingerprint()
    assert by_folder.grid == (4, 4)
    assert not by_folder.training
    assert config["data"]["image_size"] == 16


def test_the_stored_config_is_plain_and_resolved(run: Path) -> None:
    stored = read_checkpoint(run, "vqgan")["codegrid"]["config"]
    assert type(stored) is dict
    assert stored["model"]["encoder"]["image_size"] == 16


def test_missing_weights_are_an_error(run: Path) -> None:
    content = torch.load(run / LAST, weights_only=True)
    content["state_dict"].popitem()
    save(run, content)
    with pytest.raises(InputError, match="Missing key"):
        load_tokenizer(run)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_corrupt_file_is_refused_by_name(run: Path, damage: bytes | None) -> None:
    file = run / LAST
    file.write_bytes(file.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(InputError, match=r"last\.ckpt is damaged or no checkpoint"):
        read_checkpoint(run, "vqgan")


def test_a_checkpoint_of_another_program_is_refused(run: Path) -> None:
    save(run, {"state_dict": {}})
    with pytest.raises(InputError, match="no checkpoint of Codegrid"):
        read_checkpoint(run, "vqgan")


def test_the_header_has_the_version_and_the_format_of_the_program(run: Path) -> None:
    header = read_checkpoint(run, "vqgan")["codegrid"]
    assert header["version"] == VERSION
    assert header["format"] == FORMAT


def change_header(run: Path, **changes: Any) -> None:
    """Change entries of the header of last.ckpt; None takes one out."""
    content = torch.load(run / LAST, weights_only=True)
    header = content["codegrid"] | changes
    content["codegrid"] = {name: value for name, value in header.items() if value is not None}
    save(run, content)


OTHER_VERSIONS = {
    "a header without a config": {"config": None},
    "a header without a stage": {"stage": None, "version": "0.1.3"},
    "a header with a format alone": {"config": None, "stage": None, "version": None},
    "a later format without a stage": {"format": FORMAT + 3, "stage": None},
}


@pytest.mark.parametrize("changes", OTHER_VERSIONS.values(), ids=OTHER_VERSIONS)
def test_a_header_that_lacks_something_is_of_another_version_and_not_damaged(
    run: Path, changes: dict[str, Any]
) -> None:
    change_header(run, **changes)
    with pytest.raises(InputError, match="was written by Codegrid") as refusal:
        read_checkpoint(run, "vqgan")
    assert "damaged" not in str(refusal.value)


@pytest.mark.parametrize("version", [None, "0.1.0", "0.1.7"])
def test_weights_of_another_version_are_named_as_such(run: Path, version: str | None) -> None:
    content = torch.load(run / LAST, weights_only=True)
    key = "tokenizer.decoder.last.weight"
    content["state_dict"][key] = content["state_dict"][key][:2].clone()
    content["state_dict"]["tokenizer.decoder.tail.weight"] = torch.zeros(1)
    save(run, content)
    change_header(run, version=version)
    with pytest.raises(InputError, match=r"was written by .*its weights are those of another") as e:
        load_tokenizer(run)
    assert "decoder.tail.weight" in str(e.value)
    assert re.search(r"decoder\.last\.weight \[2, .*\] instead of", str(e.value))
    assert "damaged" not in str(e.value)
    change_header(run, version=VERSION)
    with pytest.raises(InputError, match="is damaged: its weights are not those of its config"):
        load_tokenizer(run)


def test_settings_and_classes_of_another_version_are_named_as_such(run: Path) -> None:
    config = read_checkpoint(run, "vqgan")["codegrid"]["config"]
    for change, reason in (
        ({"_target_": "vqgan.quantizers.ema.OldEMA"}, "it has no vqgan.quantizers.ema.OldEMA"),
        ({"_target_": "vqgan.bottlenecks.VQ"}, "it has no vqgan.bottlenecks.VQ"),
        ({"temperature_of_old": 1.0}, "its settings differ"),
    ):
        change_header(
            run, config=config | {"quantizer": config["quantizer"] | change}, version="0.1.0"
        )
        with pytest.raises(InputError, match=f"was written by Codegrid 0.1.0.*{reason}") as refusal:
            load_tokenizer(run)
        assert "trust" not in str(refusal.value)


SOUND_FILES_OF_OTHERS: dict[str, Any] = {
    "no header": {"state_dict": {}},
    "a header that is a word": {"codegrid": "0.1"},
    "a list": [torch.zeros(2)],
}


@pytest.mark.parametrize("content", SOUND_FILES_OF_OTHERS.values(), ids=SOUND_FILES_OF_OTHERS)
def test_a_sound_file_of_another_program_is_neither_damaged_nor_mistrusted(
    run: Path, content: Any
) -> None:
    save(run, content)
    with pytest.raises(InputError, match=r"is no checkpoint of Codegrid") as refusal:
        read_checkpoint(run, "vqgan")
    assert "damaged" not in str(refusal.value)
    assert "trust" not in str(refusal.value)


def test_a_zip_of_another_kind_is_no_checkpoint(run: Path) -> None:
    with zipfile.ZipFile(run / LAST, "w") as parts:
        parts.writestr("slides.xml", "<xml/>")
    with pytest.raises(InputError, match="is no checkpoint of Codegrid"):
        read_checkpoint(run, "vqgan")


@pytest.mark.parametrize(
    "content", [np.float64(3), defaultdict(int), Path("x")], ids=lambda c: type(c).__name__
)
def test_a_file_that_asks_for_code_is_not_to_be_trusted(run: Path, content: Any) -> None:
    save(run, {"codegrid": {"format": FORMAT}, "more": content})
    with pytest.raises(InputError, match=r"last\.ckpt asks for .*don't trust the file") as refusal:
        read_checkpoint(run, "vqgan")
    assert "damaged" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def resumable(run: Path) -> dict[str, Any]:
    """The state that a module expects of the checkpoint in `run`, which has all that a resumed run restores."""
    content = torch.load(run / LAST, weights_only=True)
    clock = {"step": 6, "seconds": 1.0}
    save(run, content | {"optimizer_states": [], "callbacks": {}, "clock": clock, "random": []})
    expected: dict[str, Any] = content["state_dict"]
    return expected


def test_a_whole_checkpoint_of_this_stage_is_restorable(
    run: Path, resumable: dict[str, Any]
) -> None:
    check_restorable(run, "vqgan", resumable)
    with pytest.raises(InputError, match=r"comes from stage=vqgan, and .* is of prior"):
        check_restorable(run, "prior", resumable)


@pytest.mark.parametrize("lost", ["random", "clock", "optimizer_states"])
def test_what_a_resumed_run_needs_is_checked_before_it_starts(
    run: Path, resumable: dict[str, Any], lost: str
) -> None:
    content = torch.load(run / LAST, weights_only=True)
    del content[lost]
    save(run, content)
    with pytest.raises(InputError, match=f"is damaged: it lacks {lost}"):
        check_restorable(run, "vqgan", resumable)
    change_header(run, version=None)
    with pytest.raises(InputError, match=f"written by Codegrid 0.1 or earlier.*it lacks {lost}"):
        check_restorable(run, "vqgan", resumable)


def test_weights_of_another_model_are_not_restored(run: Path, resumable: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"is damaged: its weights.*Missing keys: more\.weight"):
        check_restorable(run, "vqgan", {**resumable, "more.weight": torch.zeros(2)})


def test_loading_runs_no_code_from_the_file(run: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {run}/executed",)

    (run / LAST).write_bytes(pickle.dumps({"codegrid": Malicious()}, protocol=2))
    with pytest.raises(InputError):
        read_checkpoint(run, "vqgan")
    save(run, {"codegrid": Malicious()})
    with pytest.raises(InputError):
        read_checkpoint(run, "vqgan")
    assert not (run / "executed").exists()


def test_a_checkpoint_of_another_stage_is_refused_with_the_right_one(run: Path) -> None:
    with pytest.raises(
        InputError, match="comes from stage=vqgan, and a checkpoint of stage=prior is needed"
    ):
        read_checkpoint(run, "prior")


def test_a_newer_format_is_refused(run: Path) -> None:
    save(run, {"codegrid": {"format": FORMAT + 1, "stage": "vqgan"}})
    with pytest.raises(InputError, match="update Codegrid"):
        read_checkpoint(run, "vqgan")


def test_a_run_folder_stands_for_its_best_checkpoint_if_it_has_one(run: Path) -> None:
    assert find_checkpoint(run).name == "last.ckpt"
    (run / BEST).write_bytes((run / LAST).read_bytes())
    assert find_checkpoint(run).name == "best.ckpt"
    assert find_checkpoint(run / LAST).name == "last.ckpt"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checkpoint"):
        find_checkpoint(tmp_path)


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    save_atomically({"a": 1}, file)
    with pytest.raises(Exception, match="pickle|local object"):
        save_atomically({"a": lambda: 0}, file)
    assert torch.load(file, weights_only=True) == {"a": 1}


def flip_bit(file: Path) -> None:
    """Flip one bit of a weight, which torch.load does not notice."""
    content = bytearray(file.read_bytes())
    weight = max(torch.load(file, weights_only=True)["state_dict"].values(), key=torch.numel)
    content[content.index(weight.contiguous().numpy().tobytes()[:64])] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("how", ["flipped", "torn", "missing"])
def test_the_previous_checkpoint_is_used_if_the_last_is_corrupt(
    run: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    content = read_checkpoint(run, "vqgan")
    save_atomically(content | {"n": 2}, run / LAST, run / PREVIOUS)
    {
        "flipped": lambda: flip_bit(run / LAST),
        "torn": lambda: (run / LAST).write_bytes((run / LAST).read_bytes()[:-100]),
        "missing": lambda: (run / LAST).unlink(),  # killed between two renames
    }[how]()
    assert "n" not in read_checkpoint(run, "vqgan")
    assert ("last.ckpt is damaged" in capsys.readouterr().err) == (how != "missing")
    assert find_resumable(run) == run / PREVIOUS
    assert capsys.readouterr().err.count("the run resumes from") == 1
    assert (run / DAMAGED).exists() == (how != "missing"), (
        "or the next save would keep it as the previous one"
    )


def test_a_run_without_an_intact_checkpoint_has_to_be_started_again(run: Path) -> None:
    flip_bit(run / LAST)
    with pytest.raises(InputError, match="start the run again"):
        find_resumable(run)
    (run / LAST).unlink()
    with pytest.raises(InputError, match="ended before its first; start the run again"):
        find_resumable(run)


def test_a_corrupt_best_checkpoint_is_reported_and_the_last_is_used(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / BEST).write_bytes((run / LAST).read_bytes())
    flip_bit(run / BEST)
    load_tokenizer(run)
    assert "best.ckpt is damaged" in capsys.readouterr().err
    best = BestCheckpoint({"stage": "vqgan"}, "val/psnr")
    best.setup(L.Trainer(default_root_dir=run, logger=False), make_module(), "fit")
    assert best.step == 0
    assert "starts a new best" in capsys.readouterr().err


class FullDisk:
    """os.fsync of a disk that is full from the `first` call on, for n calls."""

    def __init__(self, first: int, n: int) -> None:
        self.calls = 0
        self.refused = range(first, first + n)
        self.fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        if self.calls in self.refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, disk: FullDisk, is_async: bool) -> None:
    """Train for 8 steps, saved at 3, 6 and the end; each save syncs its file, then its folder."""
    monkeypatch.setattr("os.fsync", disk)
    monkeypatch.setattr("tempfile.tempdir", str(folder / "elsewhere"))
    header = make_header("vqgan", compose_plain("stage=vqgan"))
    callbacks = [Checkpoints(header, 3, pauses=(0, 0))]
    fit(make_module(), callbacks, default_root_dir=folder, plugins=[AtomicCheckpointIO(is_async)])


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_is_reported_and_the_next_save_tries_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_async: bool,
) -> None:
    train(tmp_path, monkeypatch, FullDisk(3, 1), is_async)
    message = capsys.readouterr().err
    assert "step 6:" in message
    assert "can't be written (No space left on device); the last one is of step 3. " in message
    # A thread may be so late that the run, of two more steps, has ended.
    ends = ["The run continues", *(["The run ends and saves its last state"] if is_async else [])]
    assert any(end in message for end in ends)
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 8
    assert read_checkpoint(tmp_path / PREVIOUS, "vqgan")["clock"]["step"] == 3
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("is_async", [False, True])
def test_the_last_state_is_retried_and_then_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    with pytest.raises(
        InputError, match=r"the run's last state is in .*elsewhere.*last\.ckpt: move it to"
    ):
        train(tmp_path, monkeypatch, FullDisk(5, 3), is_async)
    [elsewhere] = (tmp_path / "elsewhere").rglob("last.ckpt")
    assert read_checkpoint(elsewhere, "vqgan")["clock"]["step"] == 8
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 6


@pytest.mark.parametrize("is_async", [False, True])
def test_the_last_state_is_saved_if_the_disk_has_space_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    train(tmp_path, monkeypatch, FullDisk(5, 2), is_async)
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 8
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_outgrows_the_disk_raises_oserror_and_leaves_the_old_one(
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.ckpt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_atomically({"a": 1}, file)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_atomically({"a": [torch.zeros(20_000) for _ in range(3)]}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(file, weights_only=True) == {"a": 1}
    assert [left.name for left in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_substate_has_the_keys_of_its_prefix_alone() -> None:
    assert substate({"a.x": 1, "ab.x": 2, "b": 3}, "a") == {"x": 1}
