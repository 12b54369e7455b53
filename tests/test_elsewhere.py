"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from benchmarks.report import make_run_folder
from engine import folder as run_folder
from engine import locks
from engine.locks import Lock
from tests.helpers.commands import TINY, Command, lightning_warnings
from tests.helpers.configs import ROOT

pytestmark = lightning_warnings

Prepare = Callable[[Path, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """One row: `name` is a sentence; `prepare` makes the input in the folder where the command runs."""

    name: str
    prepare: Prepare
    words: tuple[str, ...]
    expected: str  # part of what the command prints
    code: int = 0
    trains: bool = False  # then the row is one of the slow tests


def nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is needed."""


# What is only recorded about a machine may be missing; every wait has an end.


def fail(error: Exception) -> Callable[..., Any]:
    """A function that raises this."""

    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise error

    return refuse


def no_git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))


def no_sysconf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", fail(ValueError("unrecognized configuration name")))


def no_proc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPUINFO", "STATM"):
        monkeypatch.setattr(f"engine.environment.{name}", folder)


def no_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.packages.version", fail(PackageNotFoundError("torch")))


def photographs(folder: Path) -> None:
    """Forty small photographs in the folder photos."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(40):
        pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{i}.png")


def reading(act: Callable[[], Any], only_in_readers: bool) -> Prepare:
    """Photographs that do something else when they are read."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from data.source import FileSource

        photographs(folder)
        read = FileSource.read_image

        def read_image(self: FileSource, *where: int) -> Any:
            if get_worker_info() or not only_in_readers:
                act()
            return read(self, *where)

        monkeypatch.setattr("data.threads.SECONDS_TO_END", 0.05)
        monkeypatch.setattr(FileSource, "read_image", read_image)

    return prepare


def small_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.loading.free_shared_memory", lambda: 2**10)


def no_semaphores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.Lock", fail(OSError(errno.ENOSPC, "No space left")))


def stopped_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run that has the locks of the caches and shows no sign of life."""
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    monkeypatch.setattr(Lock, "take", fail(locks.Timeout("lock")))


def no_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.locks.FileLock.acquire", fail(OSError(errno.ENOLCK, "No locks")))


def read_only(name: str) -> Prepare:
    """A file where a folder would be made, which nobody may write to, root neither."""
    return lambda folder, monkeypatch: (folder / name).touch() and None


def taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another start that makes its folder at the same moment."""

    def choose(stage: str, name: str, run_dir: str | None) -> Path:
        (folder / "mine").mkdir()
        (folder / "mine/record.jsonl").touch()
        return folder / "mine"

    monkeypatch.setattr(run_folder, "choose_folder", choose)


def shell(**variables: str) -> Prepare:
    """The variables of a shell."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return prepare


EARLIER = ROOT / "tests/fixtures/run_of_0_1"
SAMPLE = ("stage=sample", f"ckpt={EARLIER}/prior", "n=2", "accelerator=cpu")
PHOTOS = (
    "stage=vqgan", "data=folder", "data.root=photos", "data.n_val=8", "data.image_size=16", "trainer.max_steps=1",
    *(word for word in TINY if not word.startswith(("data.n_", "data.image", "trainer.max"))),
)  # fmt: skip
LIVE = ("stage=vqgan", *TINY, "trainer.max_steps=1", "data.cache=none", "data.num_workers=1")
TOO_FEW = ("stage=vqgan", "trainer.accelerator=cpu", "data.n_train=4", "data.batch_size=32")
FULL = "4 training samples don't fill one batch of 32"  # the next check, after the processes are counted

MACHINE: list[Case] = [
    Case("a program runs without git", no_git, SAMPLE, '"n": 2'),
    Case("a program runs on a system that knows no sizes", no_sysconf, SAMPLE, '"n": 2'),
    Case("a program runs without /proc", no_proc, SAMPLE, '"n": 2'),
    Case("a program runs without the metadata of packages", no_metadata, SAMPLE, '"n": 2'),
    Case(
        "a disk that hangs while the cache is filled is a sentence",
        reading(lambda: time.sleep(5), only_in_readers=False),
        (*PHOTOS, "data.reader_timeout=0.2"),
        "error: no image has been read for 0.2 s (data.reader_timeout)",
        code=2,
    ),
    Case(
        "a disk that hangs during training is a sentence",
        reading(lambda: time.sleep(600), only_in_readers=True),
        (*PHOTOS, "data.cache=none", "data.num_workers=1", "data.reader_timeout=0.5"),
        "error: no image has been read for 0.5 s (data.reader_timeout)",
        code=2,
        trains=True,
    ),
    Case(
        "a reader that the system kills is a sentence that names num_workers",
        reading(lambda: os.kill(os.getpid(), signal.SIGKILL), only_in_readers=True),
        (*PHOTOS, "data.cache=none", "data.num_workers=2"),
        "memory runs out; use fewer, data.num_workers=1",
        code=2,
        trains=True,
    ),
    Case(
        "a cache that a stopped run makes is a sentence",
        stopped_run,
        ("stage=vqgan", *TINY),
        "has shown no sign of life for",
        code=2,
    ),
    Case(
        "batches that shared memory has no room for come through pipes",
        small_shared_memory,
        LIVE,
        "shared memory (/dev/shm) has 0 MiB free",
        trains=True,
    ),
    Case(
        "a system without semaphores reads in the training process",
        no_semaphores,
        LIVE,
        "this process reads the images itself",
        trains=True,
    ),
    Case("a file system without locks is no obstacle", no_locks, SAMPLE, '"n": 2'),
    Case(
        "a sweep on a file system without locks runs",
        no_locks,
        ("-m", *SAMPLE, "sweep=mine"),
        '"run": "runs/sweeps/mine/0"',
    ),
    Case(
        "a sweep whose folder can't be written is a sentence",
        read_only("runs"),
        ("-m", *SAMPLE, "seed=0,1", "sweep=mine"),
        "error: can't write the sweep's folder runs/sweeps/mine",
        code=2,
    ),
    Case(
        "a run folder that can't be written is a sentence",
        read_only("runs"),
        SAMPLE,
        "error: can't write the run folder",
        code=2,
    ),
    Case(
        "a cache folder that can't be written is a sentence",
        read_only("cache"),
        ("stage=vqgan", *TINY),
        "error: can't write the cache folder",
        code=2,
    ),
    Case(
        "a folder that another start takes at the same moment is refused",
        taken,
        (*SAMPLE, "run_dir=mine"),
        "was taken by another run at this moment",
        code=2,
    ),
    Case(
        "tasks that a shell of sbatch may start are no processes",
        shell(SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NAME="train"),
        TOO_FEW,
        FULL,
        code=2,
    ),
    Case(
        "tasks that a shell of salloc may start are no processes",
        shell(SLURM_NTASKS="6", SLURM_JOB_NAME="mine"),
        TOO_FEW,
        FULL,
        code=2,
    ),
    Case(
        "tasks that srun has started are counted",
        shell(SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_STEP_ID="0", SLURM_JOB_NAME="train"),
        TOO_FEW,
        "4 processes were started, and trainer.devices=1",
        code=2,
    ),
]


def runs_of_two_seeds(
    folder: Path, figures: dict[int, tuple[float, float]], **data: object
) -> None:
    """Finished tokenizers below runs: for each K the PSNR of seed 0 and of seed 1, as an earlier version wrote them."""
    random = np.random.default_rng(0)
    images = {"_target_": "data.folder.Folder", "n_val": 32, "held_out": "random", **data}
    for K, values in figures.items():
        for seed, psnr in enumerate(values):
            at, settings = folder / f"runs/{K}-{seed}", {"seed": seed, "data": images}
            measured = {"psnr": psnr, "K": K, "grid": [4, 4]}
            settings["quantizer"] = {"K": K}
            words = ("train.py", {"psnr": [1.0]}, "reconstructions", random)
            make_run_folder(at, "vqgan", f"{K}{seed}", settings, measured, *words)


def blank_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of one shade of white each, in a folder of their own for validation."""
    for split, shades in (("train", range(200, 216)), ("val", range(248, 256))):
        (folder / split).mkdir()
        for shade in shades:
            Image.new("L", (16, 16), shade).save(folder / split / f"{shade}.png")


BLANK = [
    *(word for word in TINY if not word.startswith(("data.n_", "trainer.max_steps"))),
    "stage=vqgan", "loss=vqvae", "data=folder", "data.root=train", "data.val_root=val", "trainer.max_steps=2",
]  # fmt: skip

# A figure is a number, or null with a reason.
NUMBERS: list[Case] = [
    Case(
        "infinite psnr of earlier runs is named",
        lambda folder, _: runs_of_two_seeds(folder, {16: (20.0, math.inf), 64: (21.0, 21.5)}),
        ("stage=report", "runs=runs"),
        "PSNR of 1 run is left out: it is infinite; stage=evaluate measures it.",
    ),
    Case(
        "a lead within each seed is clear though the seeds differ",
        lambda folder, _: runs_of_two_seeds(folder, {16: (19.0, 24.0), 64: (19.8, 24.85)}),
        ("stage=report", "runs=runs"),
        "paired by seed, 0.83 ± 0.32 dB ahead of 4×4, K=16.",
    ),
    Case(
        "a lead that changes with the seed is uncertain",
        lambda folder, _: runs_of_two_seeds(folder, {16: (20.0, 21.0), 64: (20.6, 20.9)}),
        ("stage=report", "runs=runs"),
        "paired by seed, the lead over 4×4, K=16 (0.25 ± 4.45 dB) is uncertain.",
    ),
    Case(
        "older runs say that the seed chose their images",
        lambda folder, _: runs_of_two_seeds(folder, {16: (20.0, 21.0)}, split_seed=None),
        ("stage=report", "runs=runs"),
        "In 1 of 1 configuration the seed also chose the validation images",
    ),
    Case(
        "sharpness of blank pages is null with a reason",
        blank_pages,
        (*BLANK, "run_dir=white"),
        '"absent": {"sharpness": "the images have no gradients',
        trains=True,
    ),
    Case(
        "an objective that is no number is a sentence",
        blank_pages,
        ("-m", *BLANK, "sweep=white", "quantizer.K=16,32", "objective=sharpness"),
        "objective=sharpness of runs/sweeps/white/1_quantizer.K-32 can't be compared: the images have no",
        code=2,
        trains=True,
    ),
]

# A value is taken as it is typed.
WORDS: list[Case] = []

# Where things are can change; what a run is can't.
MOVED: list[Case] = []

# Another version, damage and mistrust are three sentences; classes of one's own are admitted by name.
VERSIONS: list[Case] = []

# A split stays when files come or go.
SPLIT: list[Case] = []

# A decision about somebody's data is printed.
SUMMARY: list[Case] = []

# Samples are written as they come.
SAMPLES: list[Case] = []

CASES = [*MACHINE, *NUMBERS, *WORDS, *MOVED, *VERSIONS, *SPLIT, *SUMMARY, *SAMPLES]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.trains else [])
        for case in CASES
    ],
)
def test_what_people_meet_elsewhere(
    case: Case,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case.prepare(tmp_path, monkeypatch)
    code = command(*case.words)
    printed = capsys.readouterr()
    assert code == case.code, printed.err
    assert case.expected in printed.out + printed.err
