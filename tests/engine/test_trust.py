"""What somebody else's checkpoint or run folder can't make this program do."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from engine.checkpoint import build_trusted, save_atomically
from engine.errors import InputError
from engine.trust import OTHERS, check_trusted
from tests.helpers.commands import TINY, TINY_PRIOR, Command, lightning_warnings, read_mistake
from tests.helpers.configs import compose_plain
from vqgan.quantizers.base import Quantizer

pytestmark = lightning_warnings

EMA = compose_plain("stage=vqgan", "quantizer=ema", "quantizer.K=8", "quantizer.dim=4")["quantizer"]

EVIL = [
    "os.system",
    "torch.load",
    "builtins.eval",
    "vqganx.Evil",
    "engine.run.subprocess.run",  # what a module has imported
    "engine.run.os.system",
    "engine.run.subprocess",
    "data.decode.Image",
    "engine.checkpoint.nn.Module",
    "engine.checkpoint.save_atomically",  # a function, which would write a file
    "vqgan.quantizers.ema.EMA.lookup",  # part of a class
    "vqgan.quantizers.ema.EMA.__init__.__globals__",
    "vqgan.quantizers.vq.Codebook",  # a class of ours, but by another module's name
    "vqgan..ema.EMA",
    "vqgan",
    "",
    "${oc.env:HOME}",
    7,
]


@pytest.mark.parametrize("target", EVIL)
def test_a_checkpoints_config_builds_nothing_but_classes_that_are_defined_here(target: Any) -> None:
    for config in (
        {**EMA, "inner": {"_target_": target}},
        {**EMA, "a": [[{"_target_": target}]]},
        {"_target_": target},
    ):
        with pytest.raises(InputError, match="don't trust the file"):
            build_trusted(config, Quantizer)  # type: ignore[type-abstract]


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_mode_"])
def test_a_checkpoints_config_changes_nothing_of_how_it_is_built(key: str) -> None:
    with pytest.raises(InputError, match=f"says {key}"):
        build_trusted({**EMA, key: ["x"]} if key == "_mode_" else {**EMA, key: "x"}, Quantizer)  # type: ignore[type-abstract]


def test_a_checkpoints_config_asks_for_nothing_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "8")
    with pytest.raises(InputError, match="asks for something else on this machine"):
        build_trusted({**EMA, "K": "${oc.env:SECRET}"}, Quantizer)  # type: ignore[type-abstract]


def test_a_checkpoints_config_builds_what_its_place_is_for() -> None:
    with pytest.raises(InputError, match=r"has vqgan.quantizers.ema.EMA for a linear"):
        build_trusted(EMA, nn.Linear)
    assert build_trusted(EMA, Quantizer).K == 8  # type: ignore[type-abstract]


def test_all_that_is_trusted_beside_our_own_exists() -> None:
    from hydra.utils import get_object

    assert all(callable(get_object(target)) for target in OTHERS)


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.slow
def test_no_stage_runs_what_a_pickle_says(command: Command, tmp_path: Path) -> None:
    command("stage=vqgan", *TINY)
    command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR)
    executed = tmp_path / "executed"
    for file in Path("runs").rglob("*.ckpt"):
        content = torch.load(file, weights_only=True)
        torch.save({**content, "more": Malicious(executed)}, file)
    metrics = Path("runs/vqgan/shapes/metrics.json").read_bytes()
    for line in (
        ["stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR],
        ["stage=extract", "ckpt=runs/vqgan/shapes", "accelerator=cpu"],
        ["stage=evaluate", "ckpt=runs/vqgan/shapes", "accelerator=cpu"],
        ["stage=sample", "ckpt=runs/prior/shapes", "accelerator=cpu"],
        ["stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9"],
        ["stage=prior", "resume=runs/prior/shapes", "trainer.max_steps=9"],
    ):
        try:
            assert command(*line) != 0, line
        except (InputError, pickle.UnpicklingError):
            assert any(word.startswith("resume=") for word in line)
        assert not executed.exists(), line
    assert Path("runs/vqgan/shapes/metrics.json").read_bytes() == metrics


@pytest.mark.slow
def test_a_cache_that_holds_a_pickle_is_made_anew(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", *TINY)
    [images] = Path("cache").glob("shapes-val-*")
    evil = np.empty(1, object)
    evil[0] = Malicious(tmp_path / "executed")
    for file in images.glob("*.npy"):
        np.save(file, evil, allow_pickle=True)
    capsys.readouterr()
    assert command("stage=vqgan", *TINY, "name=again") == 0
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_run_folder_of_somebody_else_is_resumed_without_running_what_it_says(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", *TINY)
    file = Path("runs/vqgan/shapes/config.yaml")
    original = OmegaConf.load(file)
    for change in (
        {
            "callbacks": {
                "evil": {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "executed")}
            }
        },
        {
            "callbacks": {
                "evil": {"_target_": "engine.run.subprocess.run", "args": ["touch", "executed"]}
            }
        },
        {"optimizer": {"_target_": "os.mkdir", "path": "executed"}},
        {"logger": {"csv": {"_target_": "torch.utils.tensorboard.SummaryWriter"}}},
        {"data": {"_args_": ["executed"]}},
        {"run": "os.system"},
        {"name": "${oc.env:HOME}"},
    ):
        OmegaConf.save(OmegaConf.merge(original, change), file)
        capsys.readouterr()
        assert command("stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9") != 0
        assert "don't trust the file" in read_mistake(capsys)
        assert not Path("executed").exists()
    OmegaConf.save(original, file)
    assert command("stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9") == 0


def test_an_optimizer_of_the_persons_own_is_trusted_where_it_is_named_again() -> None:
    config = {"optimizer": {"_target_": "my.optimizers.Lion", "_partial_": True}}
    with pytest.raises(InputError, match=r"asks for my.optimizers.Lion"):
        check_trusted(config, "x/config.yaml", OTHERS)
    check_trusted(config, "x/config.yaml", OTHERS | {"my.optimizers.Lion"})


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "a/b"])
def test_the_name_of_a_run_is_no_way_out_of_its_folder(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for line in (
        ["stage=vqgan", f"name={name}", *TINY],
        ["-m", "stage=vqgan", f"sweep={name}", "quantizer.K=8,16", *TINY],
    ):
        assert command(*line) != 0
        assert "must be the name of one folder below runs/" in read_mistake(capsys)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == []


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_a_run_folder(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = {
        "WANDB_API_KEY": "deadbeef" * 5,
        "HF_TOKEN": "hf_verysecrettoken",
        "AWS_SECRET_ACCESS_KEY": "awsverysecret",
    }
    for name, value in {**secrets, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    words = [word for word in TINY if not word.startswith("logger")]
    assert command("stage=vqgan", *words, "logger=[wandb,csv]") == 0
    assert (
        command(
            "stage=prior",
            "ckpt=runs/vqgan/shapes",
            *(w for w in TINY_PRIOR if not w.startswith("logger")),
        )
        == 0
    )
    files = [
        file for file in (*Path("runs").rglob("*"), *Path("cache").rglob("*")) if file.is_file()
    ]
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        held = file.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in held], file


def test_a_file_with_a_pickle_is_no_checkpoint(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    save_atomically({"codegrid": Malicious(tmp_path / "executed")}, tmp_path / "x.ckpt")
    assert command("stage=evaluate", "ckpt=x.ckpt", "accelerator=cpu") == 2
    assert "is damaged or no checkpoint" in read_mistake(capsys)
    assert not (tmp_path / "executed").exists()
