"""What is recorded about a machine; all of it may be missing."""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from codegrid.engine import environment
from codegrid.engine.card import describe_machine
from codegrid.engine.environment import (
    describe_origin,
    git_revision,
    processor_name,
    resident_memory,
)
from codegrid.engine.packages import package_version
from codegrid.evaluation.scores import library_versions


def test_an_origin_is_written_as_json() -> None:
    origin = describe_origin()
    assert json.loads(json.dumps(origin)) == origin
    assert origin["torch"] == torch.__version__.partition("+")[0]


def test_a_copy_within_another_repository_has_not_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program that is installed in a folder of somebody's project."""
    installed = tmp_path / "venv" / "engine" / "environment.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    (tmp_path / "their.py").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "their.py"], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert git_revision() is None
    subprocess.run([*git, "add", "venv"], check=True)
    revision = git_revision()
    assert revision is not None
    assert revision.endswith("-dirty")


@pytest.mark.parametrize("path", ["", "/nowhere", None])
def test_without_git_the_revision_is_unknown(
    path: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if path is None:  # a program of this name that may not be run
        (tmp_path / "git").write_text("")
        path = str(tmp_path)
    monkeypatch.setenv("PATH", path)
    assert git_revision() is None
    assert describe_origin()["git"] is None


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "denied"),
        OSError(8, "Exec format error"),
        subprocess.TimeoutExpired("git", 10),
    ],
)
def test_a_git_that_can_not_be_run_or_does_not_answer_is_no_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("subprocess.run", refuse)
    assert git_revision() is None


@pytest.mark.parametrize(
    "error", [ValueError("unrecognized configuration name"), OSError(22, "invalid")]
)
def test_without_sysconf_the_memory_is_unknown(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> int:
        raise error

    monkeypatch.setattr(os, "sysconf", refuse)
    assert describe_origin()["memory_gib"] is None


def test_a_system_that_does_not_know_its_pages_has_no_memory_to_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    assert describe_origin()["memory_gib"] is None


@pytest.mark.parametrize("kind", ["missing", "folder", "not text"])
def test_without_proc_a_processor_has_a_name_and_a_process_its_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "proc"
    if kind == "folder":
        file.mkdir()  # as unreadable as a file without permission, which root may read
    elif kind == "not text":
        file.write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(environment, "CPUINFO", file)
    monkeypatch.setattr(environment, "STATM", file)
    assert processor_name()
    assert 0.01 < resident_memory() < 100


def test_the_memory_of_a_process_is_about_the_same_without_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = resident_memory()
    monkeypatch.setattr(environment, "STATM", tmp_path / "missing")
    assert 0.9 * now < resident_memory() < 10 * now  # the most so far, in the same unit


def test_a_package_without_metadata_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("codegrid.engine.packages.version", refuse)
    assert package_version("torch") is None
    assert describe_origin()["wandb"] is None
    assert library_versions("torchmetrics", "torch") == "torchmetrics unknown, torch unknown"


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", refuse)
    assert describe_origin()["device"] == processor_name()


def test_a_card_leaves_out_what_is_unknown() -> None:
    start = {
        "device": "EPYC",
        "cores": None,
        "threads": 2,
        "memory_gib": None,
        "torch": "2.9",
        "wandb": None,
    }
    assert describe_machine(start, {}) == {
        "processor": "EPYC, 2 threads",
        "versions": "torch 2.9",
    }
