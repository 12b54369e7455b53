""""""

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from omegaconf import DictConfig, OmegaConf

from engine import loggers, run
from engine.environment import best_precision, find_device
from engine.errors import InputError
from engine.loggers import make_wandb_logger
from engine.run import next_free_folder, open_folder, resolve_config
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.stage1 import make_tokenizer
from vqgan.load import make_tags


def settings(**given: object) -> DictConfig:
    return OmegaConf.create(
        {"stage": "vqgan", "name": None, "run_dir": None, "resume": None, **given}
    )


def test_a_run_folder_is_named_by_stage_and_data_and_numbered_when_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [str(open_folder(settings(), "shapes")) for _ in range(3)] == [
        "runs/vqgan/shapes", "runs/vqgan/shapes-2", "runs/vqgan/shapes-3",
    ]  # fmt: skip
    assert str(open_folder(settings(name="mine"), "shapes")) == "runs/vqgan/mine"
    assert next_free_folder(Path("runs/vqgan/mine")) == Path("runs/vqgan/mine-2")


def test_a_run_folder_explains_itself(tmp_path: Path) -> None:
    folder = open_folder(settings(run_dir=str(tmp_path / "a")), "shapes")
    assert OmegaConf.load(folder / "config.yaml").stage == "vqgan"
    record = (folder / "record.jsonl").read_text()
    assert all(
        word in record for word in ("command", "git", "torch", "lightning", "device", "cores")
    )


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(InputError, match=r"is not empty; continue that run with resume="):
        open_folder(settings(run_dir=str(tmp_path)), "shapes")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write the run folder"):
        open_folder(settings(run_dir=str(tmp_path / "file" / "run")), "shapes")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"avx512_f": True}, "32-true"),
    ],
)
def test_the_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert best_precision() == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_follows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert best_precision() == expected


def test_a_gpu_is_used_where_there_is_one_and_missed_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"
    assert find_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(InputError, match="there is no usable GPU"):
        find_device("gpu")


class Account:
    """What wandb.init was told, and a run that takes everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int = 0) -> None:
        self.told: list[dict[str, Any]] = []
        self.failures = failures
        monkeypatch.setattr("wandb.init", self.init)
        monkeypatch.setattr(loggers, "_in_netrc", lambda host: False)
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)

    def init(self, **given: Any) -> Any:
        self.told.append(given)
        if len(self.told) <= self.failures:
            raise wandb.errors.CommError("no network")
        return SimpleNamespace(define_metric=lambda *_, **__: None, id=given["id"])


@pytest.mark.parametrize(
    ("key", "mode", "used"),
    [
        (None, None, "offline"),
        ("k" * 40, None, "online"),
        ("k" * 40, "offline", "offline"),
        (None, "online", "offline"),  # it would ask for a key
        ("k" * 40, "disabled", "disabled"),
    ],
)
def test_wandb_is_offline_unless_an_account_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None, mode: str | None, used: str
) -> None:
    account = Account(monkeypatch)
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        if value:
            monkeypatch.setenv(name, value)
    make_wandb_logger(str(tmp_path), "codegrid")
    assert [told["mode"] for told in account.told] == [used]


def test_a_wandb_run_has_the_runs_id_and_is_resumed_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    account = Account(monkeypatch)
    logger = make_wandb_logger(
        str(tmp_path), "codegrid", id="0a1b2c3d", job_type="vqgan", tags=["shapes"]
    )
    assert logger.version == "0a1b2c3d"
    [told] = account.told
    assert (told["id"], told["resume"], told["job_type"], told["tags"], told["group"]) == (
        "0a1b2c3d", "allow", "vqgan", ["shapes"], None,
    )  # fmt: skip


def test_where_wandb_cannot_be_reached_the_run_is_logged_offline_and_so_are_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = Account(monkeypatch, failures=1)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")  # so that it is put back
    for _ in range(2):
        make_wandb_logger(str(tmp_path), "codegrid")
    assert [told["mode"] for told in account.told] == ["online", "offline", "offline"]
    assert "no network): the run is logged offline" in capsys.readouterr().err


def test_logging_to_tensorboard_without_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "codegrid\[tensorboard\]"'):
        resolve_config(compose_config("stage=vqgan", "logger=tensorboard"))


def test_a_run_folder_has_a_card_from_its_beginning(tmp_path: Path) -> None:
    folder = open_folder(
        settings(run_dir=str(tmp_path / "a")),
        "shapes",
        {"title": "shapes", "train": 5, "val": 2, "hash": "0"},
    )
    card = (folder / "card.md").read_text()
    assert "not finished" in card
    assert "shapes, 5 to train on and 2 to validate, hash 0" in card


def test_tags_are_the_stage_the_data_the_quantizer_the_grid_and_K() -> None:
    found = make_tags("vqgan", "x" * 100, make_tokenizer())
    assert found == ["vqgan", "x" * 64, "ema", "grid=4x4", "K=16"]  # W&B takes no more letters


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "online"])
def test_nothing_asks_for_a_key_on_a_terminal(tmp_path: Path, mode: str | None) -> None:
    program = "from engine.loggers import make_wandb_logger; import wandb; make_wandb_logger('.', 'codegrid'); wandb.finish()"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB")
    }
    environment |= {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        **({"WANDB_MODE": mode} if mode else {}),
    }
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        cwd=tmp_path,
    )
    os.close(theirs)
    try:
        assert process.wait(120) == 0  # a question would wait for ever
    finally:
        process.kill()
        os.close(ours)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
