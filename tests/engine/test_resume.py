"""Resuming: the earlier config is used as it was, with what the command may change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from engine import resume
from engine.checkpoint import save_atomically
from engine.errors import InputError
from engine.folder import CONFIG, LAST
from engine.resume import resolve_resumed, resume_command
from tests.helpers.configs import compose_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint."""
    config = compose_config("stage=vqgan", "quantizer.K=16", "trainer.max_steps=5", "logger=csv")
    config.id = "0a1b2c3d"
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    save_atomically({"weight": torch.zeros(1)}, tmp_path / LAST)
    return tmp_path


def resolve(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, has_parts: bool = False
) -> Any:
    """The config of `python train.py stage=vqgan resume=<folder> <overrides>`."""
    words = ["stage=vqgan", f"resume={folder}", *overrides]
    monkeypatch.setattr(resume, "read_overrides", lambda: words)
    return resolve_resumed(compose_config(*words), has_parts)


def test_a_resumed_run_has_its_earlier_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(folder, monkeypatch)
    assert config.quantizer.K == 16
    assert config.trainer.max_steps == 5
    assert config.id == "0a1b2c3d"
    assert config.resume == config.run_dir == str(folder)


def test_the_trainer_and_the_loggers_may_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(folder, monkeypatch, "trainer.max_steps=9", "logger=tensorboard")
    assert config.trainer.max_steps == 9
    assert list(config.logger) == ["tensorboard"]
    assert config.quantizer.K == 16


def test_any_other_change_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError,
        match=r"quantizer\.K=64 can't change; only trainer\.\*, logger\.\* and where things are can",
    ):
        resolve(folder, monkeypatch, "quantizer.K=64")


def test_a_setting_of_the_trainer_that_the_run_lacks_has_todays_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier: Any = OmegaConf.load(folder / CONFIG)
    del earlier.trainer["compile"]
    OmegaConf.save(earlier, folder / CONFIG)
    assert resolve(folder, monkeypatch).trainer.compile is False


def test_a_folder_without_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"is not a run folder .*give one such as"):
        resolve(tmp_path, monkeypatch)


@pytest.mark.parametrize("text", ["a: [", "just words", "stage: vqgan\n"])
def test_a_damaged_config_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(InputError, match=r"is damaged.*restore the file"):
        resolve(folder, monkeypatch)


def test_a_run_of_another_stage_is_refused_with_the_right_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config("stage=prior", f"resume={folder}")
    with pytest.raises(InputError, match=r"is a run of stage=vqgan; say stage=vqgan resume="):
        resolve_resumed(config, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer._target_", "os.system"), ("run", "os.system"), ("data.root", "${oc.env:HOME}")],
)
def test_a_config_that_asks_for_other_code_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    earlier: Any = OmegaConf.load(folder / CONFIG)
    OmegaConf.update(earlier, key, value, force_add=True)
    OmegaConf.save(earlier, folder / CONFIG)
    with pytest.raises(InputError, match="don't trust the file"):
        resolve(folder, monkeypatch)


def test_a_run_without_a_checkpoint_is_refused_unless_it_has_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / LAST).unlink()
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        resolve(folder, monkeypatch)
    assert resolve(folder, monkeypatch, has_parts=True).quantizer.K == 16


def test_the_command_that_resumes_a_run_is_that_of_the_whole_it_belongs_to(folder: Path) -> None:
    expected = f"resume with: python train.py stage=vqgan resume={folder}"
    assert resume_command(folder) == expected
    part = folder / "tokenizer"
    part.mkdir()
    (part / CONFIG).write_text("stage: prior\n")
    assert resume_command(part) == expected
