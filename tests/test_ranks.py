"""Runs on several devices as a user starts them: two processes on the CPU, in an empty folder."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers.commands import (
    QUICK,
    TINY,
    TINY_PRIOR,
    TWO,
    free_port,
    launch,
    read_report,
    start,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def steps(folder: Path) -> list[int]:
    """The steps at which the run logged its loss, in the order of the file."""
    [file] = folder.glob("csv/version_*/metrics.csv")
    rows = csv.DictReader(file.read_text().splitlines())
    return [
        int(row["step"])
        for row in rows
        if row.get("train/lr_generator") or row.get("train/lr_model")
    ]


def test_both_stages_train_on_two_devices_by_one_command() -> None:
    # One rank has one validation image more than the other, and the last batch is not full.
    odd = ["data.n_val=17", "data.n_train=63"]
    tokenizer = read_report(launch("stage=vqgan", *TINY, *odd, *TWO))
    prior = read_report(launch("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR, *TWO))
    for result in (tokenizer, prior):
        folder = Path(str(result["run"]))
        assert (result["devices"], result["steps"]) == (2, 6)
        # The second process makes no second folder.
        assert [p.name for p in folder.parent.iterdir()] == ["shapes"]
        assert len((folder / "record.jsonl").read_text().splitlines()) == 1
        assert json.loads((folder / "metrics.json").read_text()) == result
        assert OmegaConf.load(folder / "config.yaml").id == result["id"]
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["codegrid"]["config"]["id"] == result["id"]
        one, other = (streams["cpu"] for streams in checkpoint["random"])
        assert not torch.equal(one, other)  # each rank resumes with its own random numbers
        assert steps(folder) == [0, 1, 2, 3, 4, 5]


def test_a_sharded_prior_is_trained_by_one_command_and_used_and_resumed_by_one_process() -> None:
    # One rank has one validation batch more than the other.
    read_report(launch("stage=vqgan", *TINY, "data.n_val=17", "data.n_train=63"))
    result = read_report(
        launch("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR, *TWO, "trainer.strategy=fsdp2")
    )
    assert (result["devices"], result["steps"]) == (2, 6)
    folder = Path(str(result["run"]))
    assert {f"{name}-{step:06d}.png" for name in ("samples", "loss-map") for step in (3, 6)} <= {
        file.name for file in (folder / "pictures").iterdir()
    }
    assert steps(folder) == [0, 1, 2, 3, 4, 5]
    assert read_report(launch("stage=sample", f"ckpt={folder}", "accelerator=cpu", "n=4"))["n"] == 4
    judged = read_report(launch("stage=evaluate", f"ckpt={folder}", *QUICK))
    # The training reports its best checkpoint, which is the one evaluated here.
    assert judged["nats_per_token"] == pytest.approx(result["nats_per_token"], abs=2e-3)
    again = read_report(
        launch("stage=prior", f"resume={folder}", "trainer.devices=1", "trainer.max_steps=8")
    )
    assert (again["devices"], again["steps"], again["id"]) == (1, 8, result["id"])
    again = read_report(launch("stage=prior", f"resume={folder}", "trainer.max_steps=10"))
    assert (again["devices"], again["steps"]) == (2, 10)
    assert steps(folder) == list(range(10))


TORCHRUN = """
import os
import sys
import train

children = []
for rank in "01":
    if child := os.fork():
        children.append(child)
        continue
    os.environ |= {{
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "{port}", "TORCHELASTIC_RUN_ID": "test",
    }}
    train.main()
    sys.exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def launch_by_variables(*words: str) -> subprocess.CompletedProcess[str]:
    """A command as two processes with the variables that torchrun gives them, without its imports."""
    program = Path("torchrun.py").absolute()
    program.write_text(TORCHRUN.format(port=free_port()))
    run = start(*words, program=program)
    code = run.wait()
    return subprocess.CompletedProcess(words, code, run.output.read_text(), run.log)


def test_torchrun_starts_a_run_and_its_variables_resume_it() -> None:
    by = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    read_report(launch("stage=vqgan", *TINY, *TWO, by=by))
    result = read_report(
        launch_by_variables("stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9")
    )
    assert (result["devices"], result["steps"]) == (2, 9)
    record = Path("runs/vqgan/shapes/record.jsonl")
    assert len(record.read_text().splitlines()) == 2


def test_a_wrong_number_of_processes_is_refused_with_one_sentence() -> None:
    done = launch_by_variables("stage=vqgan", *TINY)
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0
    assert "2 processes were started, and trainer.devices=1 trainer.num_nodes=1 are 1" in sentence
    assert not Path("runs").exists()


def test_a_mistake_that_only_the_main_process_can_detect_is_reported_once() -> None:
    Path("taken").mkdir()
    Path("taken/file").touch()
    done = launch("stage=vqgan", "run_dir=taken", *TINY, *TWO)
    [sentence] = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2
    assert sentence.startswith("error: run_dir=taken is not empty")
    assert [p.name for p in Path("taken").iterdir()] == ["file"]
