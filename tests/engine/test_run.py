"""Opening, starting and finishing a run; its device, precision and W&B account."""

import json
import os
import pty
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from codegrid.engine import loggers, resume
from codegrid.engine import run as engine_run
from codegrid.engine.checkpoint import save_atomically
from codegrid.engine.environment import find_device
from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST, lock_folder
from codegrid.engine.loggers import make_wandb_logger
from codegrid.engine.precision import best_precision
from codegrid.engine.resume import read_stamp
from codegrid.engine.run import Run
from codegrid.engine.version import FORMAT, VERSION
from tests.helpers.commands import start
from tests.helpers.configs import compose_config
from tests.helpers.forks import ForkedRun
from tests.helpers.stage1 import lightning_warnings, make_module, make_noise, make_tokenizer
from vqgan.load import make_tags

pytestmark = lightning_warnings


def open_run(folder: Path, *overrides: str) -> Run:
    words = ["stage=vqgan", "trainer.accelerator=cpu", "trainer.max_steps=2", "logger=csv"]
    config = compose_config(*words, *overrides)
    config.run_dir = str(folder)  # no word, so that equal words are composed once
    return Run.open(config)


def test_nothing_is_written_before_a_run_starts(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with open_run(folder) as run:
        assert run.config.id
        assert run.device.type == "cpu"
        assert run.training.max_steps == 2
        assert not folder.exists()
        assert run.start("shapes") == folder == run.folder
    assert (folder / "config.yaml").is_file()


def test_a_mistake_in_the_settings_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trainer.val_every=0 must be"):
        open_run(tmp_path / "a", "trainer.val_every=0")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_explains_itself(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        folder = run.start("shapes", {"title": "shapes", "train": 5, "val": 2, "hash": "0"})
    written = OmegaConf.load(folder / "config.yaml")
    assert written.stage == "vqgan"
    assert written.id == run.config.id
    record = (folder / "record.jsonl").read_text()
    for word in ("command", "git", "torch", "lightning", "device", "cores"):
        assert word in record
    card = (folder / "card.md").read_text()
    assert "not finished" in card
    assert "shapes, 5 to train on and 2 to validate, hash 0" in card


def test_the_config_and_the_record_name_the_version_of_the_program(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        folder = run.start("shapes")
    assert read_stamp(folder / "config.yaml").is_current
    assert (folder / "config.yaml").read_text().startswith("codegrid:\n")
    assert json.loads((folder / "record.jsonl").read_text())["codegrid"] == VERSION
    assert f"| versions | codegrid {VERSION}, python " in (folder / "card.md").read_text()


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run of an untrained tokenizer, which this command resumes."""
    folder = tmp_path / "a"
    with open_run(folder) as run:
        run.start("shapes")
        module = make_module()
        state = {"state_dict": module.state_dict(), "optimizer_states": [], "callbacks": {}}
        clock = {"clock": {"step": 2, "seconds": 0.1}, "random": [], "codegrid": run.header}
        save_atomically(state | clock, folder / LAST)
        run.finish({"run": str(folder), "psnr": 20.5})
    words = ["stage=vqgan", f"resume={folder}"]
    monkeypatch.setattr(resume, "read_overrides", lambda: words)
    return folder


def resumed(folder: Path) -> Run:
    config = compose_config("stage=vqgan", "trainer.accelerator=cpu")
    config.resume = str(folder)
    return Run.open(config)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that says what a run was and what it reached."""
    names = ("card.md", "config.yaml", "record.jsonl", "metrics.json", "checkpoints/last.ckpt")
    return {name: (folder / name).read_bytes() for name in names}


def change_checkpoint(folder: Path, **header: Any) -> None:
    content = torch.load(folder / LAST, weights_only=True)
    content["codegrid"] |= header
    content["state_dict"]["tokenizer.more"] = torch.zeros(1)
    save_atomically(content, folder / LAST)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"version": "0.1.0", "format": 1}, "was written by Codegrid 0.1.0"),
        ({"version": "7.0", "format": FORMAT + 1}, "this program reads up to"),
        ({}, "is damaged: its weights are not those of its config"),
        ({"stage": "prior"}, "comes from stage=prior"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    finished: Path, header: dict[str, Any], sentence: str
) -> None:
    change_checkpoint(finished, **header)
    before = contents(finished)
    with pytest.raises(InputError, match=sentence), resumed(finished) as run:
        run.start("shapes", module=make_module())
    assert contents(finished) == before


class Fault(Exception):
    """Something that fails in a start."""


@pytest.mark.parametrize("where", ["before", "loggers", "after", "fit"])
def test_a_failed_start_leaves_a_finished_run_as_it_was(
    finished: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Fault

    before = contents(finished)
    if where == "loggers":
        monkeypatch.setattr(engine_run, "open_loggers", fail)
    if where == "fit":
        monkeypatch.setattr("lightning.Trainer.fit", fail)
    with pytest.raises(Fault), resumed(finished) as run:
        if where == "before":
            fail()
        module = make_module()
        run.start("shapes", module=module)
        if where == "after":
            fail()
        run.fit(module, make_noise(), [])
    assert contents(finished) == before


def test_a_run_that_broke_off_after_its_start_says_so_in_its_card(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_and_fail(trainer: Any, *_: Any, **__: Any) -> None:
        trainer.callbacks[0].on_train_start(trainer, None)
        raise Fault("no memory")

    monkeypatch.setattr("lightning.Trainer.fit", begin_and_fail)
    module = make_module()
    with pytest.raises(Fault), resumed(finished) as run:
        run.start("shapes", module=module)
        run.fit(module, make_noise(), [])
    assert "broke off at step 0: Fault no memory" in (finished / "card.md").read_text()
    assert len((finished / "record.jsonl").read_text().splitlines()) == 2


def test_settings_that_an_earlier_run_lacks_are_named_with_its_version(finished: Path) -> None:
    config: Any = OmegaConf.load(finished / "config.yaml")
    del config["codegrid"], config["quantizer"]["decay"]
    OmegaConf.save(config, finished / "config.yaml")
    before = contents(finished)
    sentence = r"config.yaml was written by Codegrid 0.1 or earlier.*its settings differ.*decay"
    with pytest.raises(InputError, match=sentence), resumed(finished) as run:
        instantiate(run.config.quantizer)
    assert contents(finished) == before


def test_a_run_with_ones_own_class_says_at_its_start_what_later_stages_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data._target_=mydata.Mine", "+callbacks.watch._target_=my.Watch"]
    with open_run(tmp_path / "a", *words) as run:
        run.start("shapes")
    need = "trust=[my.Watch,mydata.Mine]"
    assert "my.Watch and mydata.Mine are not part of Codegrid" in (
        printed := capsys.readouterr().err
    )
    assert f"add {need} to the command" in printed
    assert f"| own classes | later stages need {need} |" in (tmp_path / "a" / "card.md").read_text()
    with open_run(tmp_path / "b") as run:
        run.start("shapes")
    assert "trust" not in capsys.readouterr().err


def test_what_the_data_have_decided_is_in_the_config_and_in_the_header(tmp_path: Path) -> None:
    facts = {"title": "shapes", "train": 5, "val": 2, "hash": "0", "decided": {"split_at": 0.25}}
    with open_run(tmp_path / "a") as run:
        folder = run.start("shapes", facts)
    assert OmegaConf.load(folder / "config.yaml").data.split_at == 0.25
    assert run.header["config"]["data"]["split_at"] == 0.25


def test_a_stage_without_a_dataset_of_its_own_keeps_its_settings(tmp_path: Path) -> None:
    config = compose_config("stage=prior", "ckpt=x", "logger=csv", f"run_dir={tmp_path / 'a'}")
    before = OmegaConf.to_container(config.data)
    facts = {"title": "shapes", "train": 5, "val": 2, "hash": "0", "decided": {"split_at": 0.25}}
    with Run.open(config) as run:
        run.start("shapes", facts)
    assert run.config.data == before


def test_a_run_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write the run folder"):
        open_run(tmp_path / "file" / "run").start("shapes")


def test_an_error_that_is_not_of_the_folder_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise FileNotFoundError(2, "No such file or directory", "lspci")

    monkeypatch.setattr(engine_run, "describe_origin", refuse)
    with pytest.raises(FileNotFoundError, match="lspci"):
        open_run(tmp_path / "a").start("shapes")


def resume_run(folder: Path) -> Run:
    """A run that resumes the one in the folder, without looking for its checkpoint."""
    run = open_run(folder)
    run.config.resume = str(folder)
    return run


def test_a_run_is_not_resumed_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_run, "lock_folder", partial(lock_folder, seconds=0.2))
    with open_run(tmp_path / "a") as run:
        run.start("shapes")
        with pytest.raises(InputError, match=r"is running in another process; .*say resume="):
            resume_run(tmp_path / "a").start("shapes")
    with resume_run(tmp_path / "a") as again, pytest.raises(InputError, match="is running"):
        again.start("shapes")
        resume_run(tmp_path / "a").start("shapes")
    assert len((tmp_path / "a/record.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("record", ["threads", "none", "damaged", "missing"])
def test_a_run_that_resumes_with_other_threads_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str
) -> None:
    with open_run(tmp_path / "a") as run:
        run.start("shapes")
    file, threads = tmp_path / "a/record.jsonl", torch.get_num_threads()
    start = json.loads(file.read_text())
    assert start["threads"] == threads
    start["threads"] = threads + 7
    if record == "none":
        del start["threads"]
    file.write_text(json.dumps(start)[: -5 if record == "damaged" else None] + "\n")
    if record == "missing":
        file.unlink()
    with resume_run(tmp_path / "a") as run:
        run.start("shapes")
    sentence = f"ran with {threads + 7} threads and resumes with {threads}"
    printed = capsys.readouterr().err
    assert (sentence in printed) == (record == "threads")
    if record == "threads":
        assert f"to the bit with OMP_NUM_THREADS={threads + 7}" in printed


def test_two_runs_of_one_seed_have_different_ids(tmp_path: Path) -> None:
    assert open_run(tmp_path).config.id != open_run(tmp_path).config.id


def test_the_header_of_checkpoints_is_the_resolved_config(tmp_path: Path) -> None:
    run = open_run(tmp_path, "quantizer.K=16")
    assert run.header["stage"] == "vqgan"
    assert type(run.header["config"]) is dict
    assert run.header["config"]["quantizer"]["K"] == 16


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_a_run_closes_its_loggers_with_an_exit_code_of_1_if_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(engine_run, "close_loggers", lambda opened, failed: closed.append(failed))
    with pytest.raises(ValueError, match="broken") if fails else nullcontext(), open_run(tmp_path):
        if fails:
            raise ValueError("broken")
    assert closed == [fails]


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_is_finished_with_the_exit_code_of_the_run(
    monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("wandb.finish", lambda exit_code: codes.append(exit_code))
    loggers.close_loggers([], failed)
    assert codes == [], "nothing to close"
    loggers.close_loggers([loggers.StepWandbLogger()], failed)
    assert codes == [int(failed)]


def test_a_result_is_written_with_its_card_by_the_main_rank_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path) as run:
        run.start("shapes")
        assert run.finish({"run": str(tmp_path), "psnr": 20.5}) == {
            "run": str(tmp_path),
            "psnr": 20.5,
        }
        assert "**finished**" in (tmp_path / "card.md").read_text()
        (tmp_path / "metrics.json").unlink()
        monkeypatch.setattr(engine_run, "is_main", lambda: False)
        assert run.finish({"psnr": 20.5}) is None
        assert not (tmp_path / "metrics.json").exists()


def test_a_figure_that_is_no_number_is_null_everywhere_and_the_card_has_the_reason(
    tmp_path: Path,
) -> None:
    with open_run(tmp_path) as run:
        run.start("shapes")
        result = run.finish({"psnr": float("nan"), "ssim": 0.5, "references": [float("inf")]})
    assert result == {
        "psnr": None,
        "ssim": 0.5,
        "references": [None],
        "absent": {"psnr": "it is no number (NaN)", "references.0": "it is infinite"},
    }
    written = (tmp_path / "metrics.json").read_text()
    assert "NaN," not in written
    assert "Infinity" not in written
    assert "* psnr is absent: it is no number (NaN)" in (tmp_path / "card.md").read_text()


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


def test_a_gpu_is_used_if_there_is_one_and_its_absence_is_an_error_if_it_was_asked_for(
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
    """The calls of wandb.init, of which the first `failures` fail; its runs accept everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int = 0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.failures = failures
        monkeypatch.setattr("wandb.init", self.init)
        monkeypatch.setattr(loggers, "_in_netrc", lambda host: False)
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)

    def init(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        if len(self.calls) <= self.failures:
            import wandb

            raise wandb.errors.CommError("no network")
        return SimpleNamespace(define_metric=lambda *_, **__: None, id=arguments["id"])


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
    make_wandb_logger(str(tmp_path), "codegrid", group=None, tags=[])
    assert [call["mode"] for call in account.calls] == [used]


def test_a_wandb_run_has_the_runs_id_and_is_resumed_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    account = Account(monkeypatch)
    logger = make_wandb_logger(
        str(tmp_path), "codegrid", group=None, id="0a1b2c3d", job_type="vqgan", tags=["shapes"]
    )
    assert logger.version == "0a1b2c3d"
    [call] = account.calls
    assert (call["id"], call["resume"], call["job_type"], call["tags"], call["group"]) == (
        "0a1b2c3d", "allow", "vqgan", ["shapes"], None,
    )  # fmt: skip


def test_a_run_and_the_next_ones_are_logged_offline_if_wandb_can_not_be_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = Account(monkeypatch, failures=1)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")  # set here, so that monkeypatch restores it
    for _ in range(2):
        make_wandb_logger(str(tmp_path), "codegrid", group=None, tags=[])
    assert [call["mode"] for call in account.calls] == ["online", "offline", "offline"]
    assert "no network): the run is logged offline" in capsys.readouterr().err


def test_tags_are_the_stage_the_data_the_quantizer_the_grid_and_K() -> None:
    tags = make_tags("vqgan", "x" * 100, make_tokenizer())
    assert tags == ["vqgan", "x" * 64, "ema", "grid=4x4", "K=16"]  # W&B accepts no longer tags


BEGIN = """
from codegrid.engine.loggers import make_wandb_logger
make_wandb_logger({folder!r}, "codegrid", None, [], id={id!r})
"""
FINISH = "import wandb; wandb.finish()\n"


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "online"])
def test_nothing_asks_for_a_key_on_a_terminal(tmp_path: Path, mode: str | None) -> None:
    program = tmp_path / "program.py"
    program.write_text(BEGIN.format(folder=".", id=None) + FINISH)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB")
    }
    environment |= {"HOME": str(tmp_path), **({"WANDB_MODE": mode} if mode else {})}
    ours, theirs = pty.openpty()
    try:
        run = ForkedRun((), tmp_path, environment, tmp_path, program, os.ttyname(theirs))
        assert run.wait(120) == 0  # a question would wait for ever
    finally:
        os.close(theirs)
        os.close(ours)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


NOTEBOOK = """
import os, wandb
os.environ["WANDB_MODE"] = "offline"
wandb.setup()
print(os.environ["WANDB_SERVICE"], flush=True)
input()
"""


@pytest.mark.slow
def test_a_run_started_by_a_process_that_uses_wandb_has_a_service_of_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "elsewhere/a").mkdir(parents=True)
    begin = BEGIN.format(folder="a", id="mine")
    killed, finished = tmp_path / "killed.py", tmp_path / "finished.py"
    killed.write_text(f"{begin}import os; os.kill(os.getpid(), 9)\n")
    finished.write_text(begin + FINISH)
    with subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as notebook:
        assert notebook.stdout is not None
        inherited = {"WANDB_SERVICE": notebook.stdout.readline().strip(), "WANDB_MODE": "offline"}
        assert inherited["WANDB_SERVICE"]
        for program, code in ((killed, -9), (finished, 0)):
            run = start(folder=tmp_path / "elsewhere", program=program, **inherited)
            assert run.wait() == code, run.log
        notebook.communicate("\n")
    assert list(tmp_path.glob("elsewhere/a/wandb/offline-run-*/run-mine.wandb"))
