"""Folders that cost seconds to fill, such as those of trained runs: filled once for all tests, which read or copy them."""

import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, TINY_PRIOR
from tests.helpers.configs import ROOT


def share_folder(
    factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]
) -> Path:
    """The folder of this name that `fill` has filled, once for all processes of pytest-xdist."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder


def run_commands(folder: Path, *lines: Sequence[str]) -> None:
    """`python train.py ...` in this process and this folder, one line after the other; all must succeed."""
    import train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "1")
        for words in lines:
            patch.setattr("sys.argv", [str(ROOT / "train.py"), *words])
            train.main()


def share_runs(factory: pytest.TempPathFactory, name: str, *lines: Sequence[str]) -> Path:
    """A folder in which these commands have run; tests read it, or copy it before they go on there."""
    return share_folder(factory, name, lambda folder: run_commands(folder, *lines))


def share_tiny_runs(factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trained tokenizer, runs/vqgan/shapes, and a prior of its codes, runs/prior/shapes."""
    tokenizer = ["stage=vqgan", *TINY, "loss=vqvae"]
    prior = ["stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR]
    return share_runs(factory, "tiny", tokenizer, prior)
