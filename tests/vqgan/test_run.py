from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from data.errors import InputError
from vqgan import run
from vqgan.run import device, free, open_folder, precision, wandb_logger


def settings(**given: object) -> DictConfig:
    return OmegaConf.create({"stage": "vqgan", "name": None, "run_dir": None, "resume": None, **given})


def test_a_run_folder_is_named_by_stage_and_data_and_numbered_when_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [str(open_folder(settings(), "shapes")) for _ in range(3)] == [
        "runs/vqgan/shapes", "runs/vqgan/shapes-2", "runs/vqgan/shapes-3",
    ]  # fmt: skip
    assert str(open_folder(settings(name="mine"), "shapes")) == "runs/vqgan/mine"
    assert free(Path("runs/vqgan/mine")) == Path("runs/vqgan/mine-2")


def test_a_run_folder_explains_itself(tmp_path: Path) -> None:
    folder = open_folder(settings(run_dir=str(tmp_path / "a")), "shapes")
    assert OmegaConf.load(folder / "config.yaml").stage == "vqgan"
    record = (folder / "record.jsonl").read_text()
    assert all(word in record for word in ("command", "git", "torch", "lightning", "device", "cores"))


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
    [({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({"avx512_f": True}, "32-true")],
)
def test_the_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert precision() == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_follows_the_gpu(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert precision() == expected


def test_a_gpu_is_used_where_there_is_one_and_missed_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device("auto").type == "cuda"
    assert device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device("auto").type == "cpu"
    with pytest.raises(InputError, match="there is no usable GPU"):
        device("gpu")


@pytest.mark.parametrize(
    ("key", "mode", "offline"), [(None, None, True), ("k" * 40, None, False), ("k" * 40, "offline", True), (None, "online", False)]
)
def test_wandb_is_offline_unless_an_account_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None, mode: str | None, offline: bool
) -> None:
    made: dict[str, object] = {}

    class Fake:
        experiment = None

        def __init__(self, **given: object) -> None:
            made.update(given)

    monkeypatch.setattr(run, "WandbLogger", Fake)
    monkeypatch.setattr(run, "_in_netrc", lambda host: False)
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    wandb_logger(str(tmp_path), "codegrid")
    assert made["offline"] is offline
