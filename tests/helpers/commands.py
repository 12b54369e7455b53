"""Commands as a user types them, small enough for tests."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.configs import ROOT
from tests.helpers.forks import ForkedRun


def free_port() -> int:
    """A free port for two processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


TINY = [  # a stage=vqgan that takes seconds
    "data.n_train=64", "data.n_val=16", "data.batch_size=8", "data.image_size=16", "model.grid=4", "model.width=8",
    "model.encoder.depth=1", "model.decoder.depth=1", "quantizer.K=16", "quantizer.dim=8", "trainer.accelerator=cpu",
    "trainer.max_steps=6", "trainer.val_every=3", "trainer.save_every=2", "trainer.log_every=1", "logger=csv",
]  # fmt: skip

TINY_GAN = [*TINY, "loss.discriminator.width=8", "loss.gate.start=0.5"]

TINY_PRIOR = [
    "prior.width=16", "prior.depth=1", "prior.heads=2", "batch_size=8", "trainer.accelerator=cpu", "trainer.max_steps=6",
    "trainer.val_every=3", "trainer.save_every=2", "trainer.log_every=1", "logger=csv",
]  # fmt: skip

QUICK = ["accelerator=cpu", "proxy=2", "fetch=false"]  # a stage=evaluate that takes seconds

Command = Callable[..., int]

lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:.*logging on a CPU",
    "ignore:.*batch_size.*ambiguous",
)


def read_mistake(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error that a mistake gets; nothing else is printed."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


TWO = ["trainer.devices=2", "trainer.precision=32-true"]


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without a scheduler's variables, on one CPU thread, with W&B off unless `more` says otherwise."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "LOCAL_RANK", "WORLD_SIZE"))
    }
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    return inherited | alone | more


@cache
def make_log_folder() -> Path:
    """A folder for what this process's commands print, which goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="codegrid-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def start(
    *words: str, folder: Path | None = None, program: Path = ROOT / "train.py", **environment: str
) -> ForkedRun:
    """Start `python train.py ...` in a folder, the current one by default, as a process of its own. `program` is another file."""
    logs = Path(tempfile.mkdtemp(dir=make_log_folder()))
    return ForkedRun(words, folder or Path.cwd(), clean_environment(**environment), logs, program)


def launch(
    *words: str,
    by: tuple[str, ...] = (),
    folder: Path | None = None,
    imports: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """`python train.py ...` as a process of its own, to its end; started by the program `by` if given, such as torchrun.

    A process that `imports` is no fork, for environments that libraries read when they are imported.
    """
    if by or imports:
        line = [sys.executable, *by, str(ROOT / "train.py"), *words]
        return subprocess.run(
            line, cwd=folder, capture_output=True, text=True, timeout=240,
            env=clean_environment(**environment), check=False,
        )  # fmt: skip
    run = start(*words, folder=folder, **environment)
    code = run.wait()
    return subprocess.CompletedProcess(words, code, run.output.read_text(), run.log)


def read_report(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The result that the command printed, once."""
    assert done.returncode == 0, done.stderr
    [line] = [text for text in done.stdout.splitlines() if text.startswith("{")]
    result: dict[str, object] = json.loads(line)
    return result
