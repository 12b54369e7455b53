"""train(): a command as a call in Python."""

import asyncio
import gc
import json
import logging
import os
import random
import re
import shlex
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from codegrid.engine import calls
from codegrid.engine.callbacks.signals import Stop
from codegrid.engine.calls import RunResult, train
from codegrid.engine.errors import InputError
from codegrid.engine.figures import format_figures
from codegrid.engine.folder import CONFIG, LAST, METRICS, RECORD
from codegrid.engine.resume import resume_command
from codegrid.engine.settings import TrainerSettings
from tests.helpers.commands import (
    TINY,
    Command,
    lightning_warnings,
    read_mistake,
    start,
)
from tests.helpers.configs import ROOT

Stage = Callable[[Any], dict[str, Any]]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], None]:
    """Put a function in the place of all stages."""
    return lambda function: monkeypatch.setattr(calls, "run_stage", function)


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_a_call_returns_the_folder_and_the_figures_of_its_run(
    stage: Callable[[Stage], None],
) -> None:
    stage(lambda config: {"run": f"runs/{config.stage}/{config.quantizer.K}", "pictures": ["a"]})
    result = train("stage=vqgan", "quantizer.K=99")
    assert result.folder == Path("runs/vqgan/99")
    assert result.metrics["run"] == "runs/vqgan/99"
    assert result.pictures == [Path("a")]


def test_a_stage_without_pictures_has_none() -> None:
    assert RunResult(Path("a"), {}).pictures == []


def test_a_call_composes_what_the_command_composes(
    stage: Callable[[Stage], None], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["stage=vqgan", "data=folder", "data.root=my photos (2), b", "name=7", "loss=vqvae"]
    composed: list[Any] = []

    def keep(config: Any) -> dict[str, Any]:
        words = list(HydraConfig.get().overrides.task)
        composed.append((OmegaConf.to_container(config, resolve=True), words, sys.argv[1:]))
        return {"run": "a"}

    stage(keep)
    monkeypatch.setattr("codegrid.engine.command.run_stage", keep)
    train(*words)
    assert command(*words) == 0
    assert composed[0] == composed[1]


def test_nothing_of_a_run_stays_in_the_process(stage: Callable[[Stage], None]) -> None:
    lightning = logging.getLogger("lightning.pytorch")

    def disturb(config: Any) -> dict[str, Any]:
        L.seed_everything(config.seed, verbose=False)
        warnings.filterwarnings("ignore", message="of a run")
        lightning.setLevel("ERROR")
        os.environ["WANDB_MODE"] = "offline"  # as after a try to reach W&B
        return {"run": "a"}

    stage(disturb)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    undisturbed = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    before = [*sys.argv], [*warnings.filters], lightning.level, dict(os.environ), handlers
    train("stage=vqgan")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert ([*sys.argv], [*warnings.filters], lightning.level, dict(os.environ), handlers) == before
    assert draw() == undisturbed
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


@pytest.mark.parametrize("error", [InputError("no"), KeyError("a bug"), SystemExit(143)])
def test_a_run_that_fails_leaves_nothing_in_the_process_either(
    stage: Callable[[Stage], None], error: BaseException
) -> None:
    def fail(config: Any) -> dict[str, Any]:
        draw()
        raise error

    stage(fail)
    torch.manual_seed(3), random.seed(1), np.random.seed(2)
    undisturbed = draw()
    torch.manual_seed(3), random.seed(1), np.random.seed(2)
    argv = [*sys.argv]
    with pytest.raises(type(error)):
        train("stage=vqgan")
    assert sys.argv == argv
    assert draw() == undisturbed
    assert not GlobalHydra.instance().is_initialized()


def test_a_session_of_hydra_that_the_user_has_begun_goes_on(stage: Callable[[Stage], None]) -> None:
    stage(lambda config: {"run": "a"})
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        train("stage=vqgan")
        assert hydra.compose("config", ["stage=report"]).stage == "report"


def test_a_call_works_inside_a_running_event_loop(stage: Callable[[Stage], None]) -> None:
    stage(lambda config: {"run": "a"})

    async def cell() -> RunResult:
        return train("stage=vqgan")

    assert asyncio.run(cell()).folder == Path("a")


@pytest.mark.parametrize(
    "words",
    [
        ["stage=vqgan", "model.grid=7"],
        ["stage=vqgan", "quantizer.k=7"],
        ["stage=vqgan", "quantizer=emma"],
        ["stage=prior"],
        ["stage=vqgan", "seed=-1"],
        ["quantizer.K"],
        [],
    ],
)
def test_a_mistake_gets_the_sentence_of_the_command_line(
    words: list[str], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as mistake:
        train(*words)
    assert mistake.value.__context__ is None, "frames would hold the run's tensors"
    assert capsys.readouterr() == ("", "")
    assert command(*words) == 2
    assert read_mistake(capsys) == f"error: {mistake.value}"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-m", "stage=vqgan"], "-m starts a sweep, and train() makes a single run"),
        (["stage=vqgan", "--multirun"], "--multirun starts a sweep"),
        (["stage=vqgan", "quantizer.K=128,256"], "quantizer.K=128,256 has several values, and"),
        (["stage=vqgan", "seed=range(3)"], "seed=range(3) has several values, and train()"),
        (["stage=vqgan", "experiment=grid_by_K"], "these settings describe a sweep, and train()"),
        (["stage=vqgan", "--cfg", "job"], "--cfg is for the command in a shell"),
        (["--help"], "--help is for the command in a shell"),
        (["stage=vqgan", "--config-dir=nowhere"], "--config-dir=nowhere is not a folder"),
    ],
)
def test_what_only_a_shell_can_do_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(InputError) as mistake:
        train(*words)
    assert reason in str(mistake.value)


def test_configs_of_the_users_own_are_read(stage: Callable[[Stage], None], tmp_path: Path) -> None:
    (tmp_path / "quantizer").mkdir()
    (tmp_path / "quantizer" / "mine.yaml").write_text("K: 77\n")
    stage(lambda config: {"run": f"{config.quantizer.K}"})
    assert train(f"--config-dir={tmp_path}", "stage=vqgan", "quantizer=mine").folder.name == "77"
    assert train("stage=vqgan", "-cd", f"{tmp_path}", "quantizer=mine").folder.name == "77"


def test_several_devices_are_refused(stage: Callable[[Stage], None]) -> None:
    def open_run(config: Any) -> dict[str, Any]:
        TrainerSettings.read(config.trainer).check_machine(shards=True)
        return {"run": "a"}

    stage(open_run)
    words = ["stage=vqgan", "trainer.accelerator=cpu"]
    train(*words)
    with pytest.raises(
        InputError, match="these devices and num_nodes are 2 processes, and train\\(\\) has one"
    ):
        train(*words, "trainer.devices=2")


def test_the_advice_how_to_resume_is_a_call(
    stage: Callable[[Stage], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / CONFIG).write_text("stage: vqgan\n")

    def stop(config: Any) -> dict[str, Any]:
        error = Stop(130)
        error.add_note(resume_command(folder))
        raise error

    stage(stop)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train("stage=vqgan")
    assert str(interrupt.value) == f"resume with: train('stage=vqgan', 'resume={folder}')"
    resumed: list[str] = []
    stage(lambda config: resumed.append(config.resume) or {"run": "a"})  # type: ignore[func-returns-value]
    eval(str(interrupt.value).removeprefix("resume with: "))
    assert resumed == [str(folder)]
    assert resume_command(folder).startswith("resume with: python train.py stage=vqgan")


class Model:
    """Something large."""


@pytest.mark.parametrize("error", [InputError("no"), Stop(130)])
def test_an_error_that_a_notebook_keeps_holds_nothing_of_the_run(
    stage: Callable[[Stage], None], error: BaseException
) -> None:
    models: list[weakref.ref[Model]] = []

    def fail(config: Any) -> dict[str, Any]:
        model = Model()
        model.trainer = model  # type: ignore[attr-defined]
        models.append(weakref.ref(model))
        raise type(error)(*error.args)

    stage(fail)
    caught: BaseException | None = None
    try:
        train("stage=vqgan")
    except (InputError, KeyboardInterrupt) as raised:
        caught = raised
    assert caught is not None
    gc.collect()
    assert models[0]() is None


def test_a_word_that_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="512 is no text; each word is a setting"):
        train("stage=vqgan", 512)  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "expected"), [(143, 143), (None, 143), (138, 138)])
def test_a_scheduler_still_ends_the_process(
    stage: Callable[[Stage], None], code: int | None, expected: int
) -> None:
    def stop(config: Any) -> dict[str, Any]:
        raise SystemExit(code)

    stage(stop)
    with pytest.raises(SystemExit) as ended:
        train("stage=vqgan")
    assert ended.value.code == expected


@pytest.mark.slow
@lightning_warnings
def test_two_calls_equal_two_commands_to_the_bit(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stage=vqgan", "loss=vqvae", *TINY]
    for name in ("a", "b"):
        result = train(*words, f"name={name}")
        assert "{" not in capsys.readouterr().out, "the figures are returned, not printed"
        assert result.folder == Path(f"runs/vqgan/{name}")
        assert json.loads((result.folder / METRICS).read_text()) == json.loads(
            format_figures(result.metrics)
        )
        assert all(picture.is_file() for picture in result.pictures)
    assert command(*words, "name=c") == 0
    [record] = (result.folder / RECORD).read_text().splitlines()
    assert json.loads(record)["command"] == shlex.join(["train.py", *words, "name=b"])
    weights = [torch.load(Path("runs/vqgan") / name / LAST)["state_dict"] for name in "abc"]
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name
        assert value.equal(weights[2][name]), name


SCRIPT = """
from vqgan import train

try:
    train(*{words})
except KeyboardInterrupt as interrupt:
    print(interrupt)
    call = str(interrupt).partition("; resume with: ")[2]
    print(eval(call).metrics["steps"])
"""


@pytest.mark.slow
def test_ctrl_c_in_a_script_saves_the_run_and_says_how_to_resume_it(tmp_path: Path) -> None:
    words = ["stage=vqgan", "loss=vqvae", *TINY, "trainer.max_steps=200", "trainer.val_every=200"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(words=words))
    run = start(folder=tmp_path, program=script)
    checkpoint = tmp_path / "runs/vqgan/shapes" / LAST
    while not checkpoint.exists() and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.log
    sentence, steps = run.output.read_text().splitlines()
    assert re.fullmatch(
        r"stopped at step \d+, saved; resume with: train\('stage=vqgan', 'resume=runs/vqgan/shapes'\)",
        sentence,
    )
    assert steps == "200"
    assert "Traceback" not in run.log
