"""How many processes a run has, by the variables of those who start them; no process is started here."""

import os
from typing import Any

import pytest

from codegrid.engine.distributed import (
    cluster_plugins,
    count_processes,
    report_mistake,
    slurm_task_count,
)
from codegrid.engine.errors import InputError

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}  # srun's own


@pytest.fixture(autouse=True)
def plain_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC", "LOCAL_RANK", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)


def set_variables(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_NTASKS": "4"},  # salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"},  # sbatch
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash", **STEP},  # srun --pty bash
        {"SLURM_NPROCS": "4", "NTASKS": "4", "WORLD_SIZE": "4", "RANK": "0"},
    ],
    ids=["salloc", "sbatch", "interactive", "others"],
)  # fmt: skip
def test_a_shell_that_has_tasks_to_give_has_started_none(
    shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, **shell)
    assert slurm_task_count() is None
    assert count_processes(1, 1, "cpu") == 1
    assert count_processes(3, 1, "cpu") == 3, "the program starts the others itself"


@pytest.mark.parametrize("n", [1, 4])
def test_lightning_takes_such_a_shell_for_what_it_is(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster_plugins(n) == []
    set_variables(monkeypatch, SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_JOB_NAME="train")
    [plugin] = cluster_plugins(n)
    assert type(plugin).__name__ == "LightningEnvironment"
    assert not plugin.creates_processes_externally


def test_srun_and_torchrun_keep_lightnings_plugins_and_so_does_a_batch_job_of_one_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_variables(monkeypatch, SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_JOB_NAME="train")
    assert cluster_plugins(1) == [], "or SLURM would not requeue it"
    assert len(cluster_plugins(2)) == 1
    set_variables(monkeypatch, **STEP, SLURM_NTASKS="4")
    assert cluster_plugins(4) == []
    set_variables(monkeypatch, TORCHELASTIC_RUN_ID="x", WORLD_SIZE="2")
    assert cluster_plugins(2) == []


@pytest.mark.parametrize("variable", [*STEP, "SLURM_SRUN_COMM_HOST"])
def test_tasks_of_srun_are_counted(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **{variable: "0"}, SLURM_NTASKS="4", SLURM_PROCID="2")
    assert slurm_task_count() == "4"
    assert count_processes(4, 1, "cpu") == 4
    with pytest.raises(InputError, match=r"4 processes were started, and trainer.devices=1"):
        count_processes(1, 1, "cpu")


def test_several_machines_need_a_launcher_in_such_a_shell_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_variables(monkeypatch, SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_JOB_NAME="train")
    with pytest.raises(InputError, match="needs torchrun or srun on every machine"):
        count_processes(1, 2, "cpu")


def test_a_rank_that_nobody_gave_does_not_hide_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[Any] = []
    monkeypatch.setattr("codegrid.engine.distributed.time.sleep", slept.append)
    set_variables(monkeypatch, RANK="3", WORLD_SIZE="8")  # left over in a shell
    report_mistake("error: x")
    assert capsys.readouterr().err == "error: x\n"
    set_variables(monkeypatch, TORCHELASTIC_RUN_ID="x")
    report_mistake("error: x")
    assert capsys.readouterr().err == ""
    assert slept == [5]
