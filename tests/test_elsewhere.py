"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

import errno
import json
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import get_worker_info

from benchmarks.report import make_run_folder
from codegrid.data.pictures import save_picture
from codegrid.engine import folder as run_folder
from codegrid.engine import locks
from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.folder import LAST, append_record, write_config
from codegrid.engine.locks import Lock
from codegrid.engine.resume import resume_command
from prior.saving import SampleBatch, SampleSaver
from prior.stages.sample import draw_samples
from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.runs import save_prior_run, save_tokenizer_run

pytestmark = lightning_warnings

SMALL_RUN = [word for word in TINY if "data.n_" not in word]

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


def occupy(name: str) -> Prepare:
    """A folder of this name that holds a file."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / name).mkdir()
        (folder / name / "x").touch()

    return prepare


def live_in(home: str) -> Prepare:
    """The user's home folder."""
    return lambda folder, monkeypatch: monkeypatch.setenv("HOME", home)


FIXTURES = Path(__file__).parent / "fixtures" / "run_of_0_1"


def moved_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two finished runs of a few steps, a tokenizer and a prior, that were moved after they ended."""
    shutil.copytree(FIXTURES, folder / "elsewhere")


def another_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved_runs(folder, monkeypatch)
    save_atomically({"codegrid": make_header("vqgan", {"id": "zz"})}, folder / "another.ckpt")


def paint_images(root: Path, n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(n):
        file = root / ("cats", "dogs")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(file)


def run_on_photos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on eight photos left, whose folder was called gone; and folders with other images, and with too few."""
    paint_images(folder / "gone", 8, 0)
    paint_images(folder / "others", 8, 1)
    paint_images(folder / "few", 1, 2)
    config = compose_config(
        "stage=vqgan", "data=folder", "data.root=gone", "data.n_val=2", *SMALL_RUN
    )
    (folder / "run").mkdir()
    write_config(folder / "run", OmegaConf.to_yaml(config, resolve=True))
    save_atomically({}, folder / "run" / LAST)
    images = instantiate(config.data)
    append_record(folder / "run", {}, images.describe())
    images.record_images(folder / "run")
    (folder / "gone").rename(folder / "photos")


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
        monkeypatch.setattr(f"codegrid.engine.environment.{name}", folder)


def no_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegrid.engine.packages.version", fail(PackageNotFoundError("torch")))


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
        from codegrid.data.source import FileSource

        photographs(folder)
        read = FileSource.read_image

        def read_image(self: FileSource, *where: int) -> Any:
            if get_worker_info() or not only_in_readers:
                act()
            return read(self, *where)

        monkeypatch.setattr("codegrid.data.threads.SECONDS_TO_END", 0.05)
        monkeypatch.setattr(FileSource, "read_image", read_image)

    return prepare


def small_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegrid.data.loading.free_shared_memory", lambda: 2**10)


def no_semaphores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.Lock", fail(OSError(errno.ENOSPC, "No space left")))


def stopped_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run that has the locks of the caches and shows no sign of life."""
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    monkeypatch.setattr(Lock, "take", fail(locks.Timeout("lock")))


def no_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "codegrid.engine.locks.FileLock.acquire", fail(OSError(errno.ENOLCK, "No locks"))
    )


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
    images = {"_target_": "codegrid.data.folder.Folder", "n_val": 32, "held_out": "random", **data}
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
WORDS: list[Case] = [
    Case(
        "a folder's name has accents, brackets, a comma and an equals sign",
        nothing,
        ("stage=vqgan", "data=folder", "data.root=/data/Größe (1), x=2"),
        "data.root=/data/Größe (1), x=2 is not a folder",
        2,
    ),
    Case(
        "a file's name has a hash, an ampersand and an exclamation mark",
        nothing,
        ("stage=sample", "ckpt=R&D #1!"),
        "ckpt=R&D #1! has no checkpoint",
        2,
    ),
    Case(
        "a list has names with an apostrophe and a question mark",
        nothing,
        ("stage=report", "runs=[it's mine?,café]"),
        "runs=it's mine? is not a folder",
        2,
    ),
    Case(
        "a name is a call of a function to Hydra",
        nothing,
        ("stage=extract", "ckpt=glob(1)"),
        "ckpt=glob(1) has no checkpoint",
        2,
    ),
    Case(
        "home is written as a tilde before a name with a comma",
        live_in("/home/me (2)"),
        ("stage=vqgan", "resume=~/runs, old"),
        "resume=/home/me (2)/runs, old is not a run folder",
        2,
    ),
    Case(
        "home is quoted inside of the word",
        live_in("/home/me"),
        ("stage=evaluate", "ckpt='~/a'"),
        "ckpt=/home/me/a has no checkpoint",
        2,
    ),
    Case(
        "the command that resumes a run has the quotes that a shell needs",
        occupy("a (1), b"),
        ("stage=vqgan", *TINY, "run_dir=a (1), b"),
        "continue that run with 'resume=a (1), b'",
        2,
    ),
    Case(
        "the command that resumes a run has the quotes that Hydra needs",
        occupy("[1]"),
        ("stage=vqgan", *TINY, "run_dir='[1]'"),
        """continue that run with 'resume="[1]"'""",
        2,
    ),
    Case(
        "an option follows the settings",
        nothing,
        ("stage=vqgan", "sweep=s", "-m", "run_dir=x"),
        "run_dir=x is for a single run",
        2,
    ),
    Case(
        "an option does not exist",
        nothing,
        ("stage=vqgan", "--batch_size", "8"),
        "--batch_size is not an option; settings are written without dashes",
        2,
    ),
    Case(
        "a space splits a value",
        nothing,
        ("stage=vqgan", "run_dir=my", "run"),
        "run is not a setting, which is written key=value",
        2,
    ),
    Case(
        "a single run gets several values",
        nothing,
        ("stage=vqgan", "model.width=8,16"),
        "model.width=8,16 has several values, and a single run takes one; add -m",
        2,
    ),
    Case(
        "a folder's name is a number",
        occupy("1_000"),
        ("stage=vqgan", "data=folder", "data.root=1_000"),
        "1_000 holds no image",
        2,
    ),
    Case(
        "a run folder's name is a truth value",
        occupy("True"),
        ("stage=vqgan", *TINY, "run_dir=True"),
        "run_dir=True is not empty; continue that run with resume=True",
        2,
    ),
    Case(
        "an earlier run's name is a number with an exponent",
        nothing,
        ("stage=vqgan", "resume=1e3"),
        "resume=1e3 is not a run folder",
        2,
    ),
    Case(
        "the folders of a report are numbers",
        nothing,
        ("stage=report", "runs=[2024,2025]"),
        "runs=2024 is not a folder",
        2,
    ),
    Case(
        "a name is a list",
        nothing,
        ("stage=vqgan", "name=[a,b]"),
        "name=['a', 'b'] is a list or a mapping, and name takes one text",
        2,
    ),
    Case(
        "a W&B project has a character that W&B refuses",
        nothing,
        ("stage=vqgan", "logger=wandb", "logger.wandb.project=20%"),
        "logger.wandb.project=20% must have 1 to 128 characters",
        2,
    ),
    Case(
        "a W&B tag is too long",
        nothing,
        ("stage=vqgan", "logger=wandb", f"logger.wandb.tags=[1,{'x' * 65}]"),
        "must be a text of 1 to 64 characters",
        2,
    ),
    Case(
        "an id is none for W&B",
        nothing,
        ("stage=vqgan", "logger=wandb", "id=a/b"),
        "id=a/b names the run in W&B",
        2,
    ),
    Case(
        "Optuna's study can't be read with a newer library",
        lambda folder, monkeypatch: monkeypatch.setattr(
            "codegrid.engine.sweep.version", lambda name: "2.0.1"
        ),
        ("experiment=optuna_tokenizer", "-m", "hydra.sweeper.storage=sqlite:///a=b.db"),
        "hydra.sweeper.storage=sqlite:///a=b.db needs SQLAlchemy below 2",
        2,
    ),
]

# Where things are can change; what a run is can't.
MOVED = [
    Case(
        "a moved run resumes with another cache",
        moved_runs,
        ("stage=vqgan", "resume=elsewhere/tokenizer", "cache_dir=other", "data.cache=ram"),
        '"run": "elsewhere/tokenizer"',
    ),
    Case(
        "a moved prior resumes by the copy of its tokenizer",
        moved_runs,
        ("stage=prior", "resume=elsewhere/prior", "data.num_workers=0"),
        '"run": "elsewhere/prior"',
    ),
    Case(
        "a prior's tokenizer can't be another",
        another_tokenizer,
        ("stage=prior", "resume=elsewhere/prior", "ckpt=another.ckpt"),
        "is the run zz, and elsewhere/prior learned the codes of the tokenizer ",
        2,
    ),
    Case(
        "samples are compared with images in a folder that they don't have",
        moved_runs,
        ("stage=sample", "ckpt=elsewhere/prior", "save=neighbours", "data.val_root=x", "n=2"),
        "these settings can: data.cache, data.cache_dir, ",
        2,
    ),
    Case(
        "a resumed run can't have other shapes",
        moved_runs,
        ("stage=vqgan", "resume=elsewhere/tokenizer", "data.n_train=8"),
        "data.n_train=8 can't change; only trainer.*, logger.* and where things are can: cache_dir",
        2,
    ),
    Case(
        "a resumed run can't find its images",
        run_on_photos,
        ("stage=vqgan", "resume=run"),
        "data.root=gone is not a folder",
        2,
    ),
    Case(
        "a resumed run finds other images",
        run_on_photos,
        ("stage=vqgan", "resume=run", "data.root=others", "cache_dir=c"),
        "train has 6 images (6 of the same name with another content)",
        2,
    ),
    Case(
        "a resumed run finds too few images",
        run_on_photos,
        ("stage=vqgan", "resume=run", "data.root=few"),
        "data.n_val=2 must leave both splits an image; there are 1; but this command takes its images from a run",
        2,
    ),
    Case(
        "a resumed run gets validation images of other classes",
        run_on_photos,
        ("stage=vqgan", "resume=run", "data.root=photos", "data.val_root=."),
        "has class folders that the training images in photos lack",
        2,
    ),
]

# Another version, damage and mistrust are three sentences; classes of one's own are admitted by name.
EARLIER = ROOT / "tests" / "fixtures" / "run_of_0_1"


def earlier_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer and a prior of version 0.1."""
    for name in ("tokenizer", "prior"):
        shutil.copytree(EARLIER / name, folder / name)


def of_earlier_code(change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """These runs, with a checkpoint of the tokenizer as other code wrote it."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        earlier_runs(folder, monkeypatch)
        file = folder / "tokenizer" / "checkpoints" / "last.ckpt"
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)

    return prepare


def with_config(text: str) -> Prepare:
    """These runs, with more in the tokenizer's config.yaml."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        earlier_runs(folder, monkeypatch)
        with (folder / "tokenizer" / "config.yaml").open("a") as config:
            config.write(text)

    return prepare


def mine(content: dict[str, Any]) -> None:
    content["codegrid"]["config"]["quantizer"]["_target_"] = "mylab.Residual"


RESUME = ("stage=vqgan", "resume=tokenizer", "trainer.max_steps=9")
EVALUATE = ("stage=evaluate", "ckpt=tokenizer", "accelerator=cpu", "lpips=null")
VERSIONS: list[Case] = [
    Case(
        "a resumed run of other code with other weights is of another version",
        of_earlier_code(lambda content: content["state_dict"].popitem()),
        RESUME,
        "was written by Codegrid 0.1 or earlier, and this program is",
        2,
    ),
    Case(
        "a resumed run of a program that saved no random state is of another version",
        of_earlier_code(lambda content: content.pop("random")),
        RESUME,
        "it lacks random; use the version that wrote it",
        2,
    ),
    Case(
        "a resumed run of a later program needs that one",
        with_config("codegrid: {version: 3.1.0, format: 99}\n"),
        RESUME,
        "config.yaml was written by Codegrid 3.1.0 and has format 99, this program reads up to",
        2,
    ),
    Case(
        "a tokenizer whose quantizer is gone is of another version",
        of_earlier_code(
            lambda c: c["codegrid"]["config"]["quantizer"].update(
                _target_="vqgan.quantizers.tree.Tree"
            )
        ),
        EVALUATE,
        "it has no vqgan.quantizers.tree.Tree; use the version that wrote it",
        2,
    ),
    Case(
        "a prior on a tokenizer whose header lacks its config is refused by its version",
        of_earlier_code(lambda content: content["codegrid"].pop("config")),
        ("stage=prior", "ckpt=tokenizer"),
        "its header lacks config; use the version that wrote it",
        2,
    ),
    Case(
        "a checkpoint with a function of numpy asks for what no checkpoint needs",
        of_earlier_code(lambda content: content.update(psnr=np.float64(20.5))),
        ("stage=extract", "ckpt=tokenizer"),
        "which reading a checkpoint of Codegrid never needs; don't trust the file",
        2,
    ),
    Case(
        "a quantizer of ones own is refused with the word that admits it",
        of_earlier_code(mine),
        EVALUATE,
        "add trust=[mylab.Residual], else don't trust the file",
        2,
    ),
    Case(
        "a class that is admitted and can't be imported is named with the way to it",
        of_earlier_code(mine),
        (*EVALUATE, "trust=[mylab.Residual]"),
        "mylab.Residual can't be imported; if it is a class of your own, put the folder of its module on PYTHONPATH",
        2,
    ),
    Case(
        "another choice of data than the checkpoint's is refused in a later stage",
        earlier_runs,
        (*EVALUATE, "data=cifar10"),
        "this command chooses codegrid.data.torchvision.CIFAR10 for data, and the checkpoint has "
        "codegrid.data.shapes.Shapes, which stays",
        2,
    ),
    Case(
        "a word of trust that is no name of a class is refused",
        earlier_runs,
        (*RESUME, "trust=[Residual]"),
        "trust=Residual must be the full name of a class",
        2,
    ),
    Case(
        "python itself is never admitted",
        earlier_runs,
        ("stage=sample", "ckpt=prior", "trust=[shutil.rmtree]"),
        "trust=shutil.rmtree is part of Python itself",
        2,
    ),
]

# A split stays when files come or go.
FOLDER = ("stage=vqgan", "data=folder", "data.root=photos", "data.n_val=2")
QUICKLY = (  # TINY without what only shapes have
    *(word for word in TINY if not word.startswith(("data.n_", "trainer.max_steps", "data.batch"))),
    "trainer.max_steps=1",
    "data.batch_size=2",
)


def classes(*files: str) -> Prepare:
    """Small pictures at these paths, each with its own content."""

    def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (number, 9 * number, 0)).save(folder / file)

    return prepare


FOUR = ("photos/a/1.png", "photos/a/2.png", "photos/b/1.png", "photos/c/1.png")
SPLIT: list[Case] = [
    Case(
        "a validation folder lacks two classes",
        classes(*FOUR, "val/c/9.png"),
        (*FOLDER, "data.val_root=val", *QUICKLY),
        "val has images of 1 of the 3 classes in photos, none of a, b",
    ),
    Case(
        "a validation folder has no class folders",
        classes(*FOUR, "val/8.png", "val/9.png"),
        (*FOLDER, "data.val_root=val", *QUICKLY),
        "2 images of val lie in no class folder and have no class",
    ),
    Case(
        "a validation folder has a class that training lacks",
        classes(*FOUR, "val/aa/9.png"),
        (*FOLDER, "data.val_root=val", *QUICKLY),
        "val has class folders that the training images in photos lack: aa; rename them as in training",
        2,
    ),
    Case(
        "a boundary beyond all names leaves a split empty",
        classes(*FOUR),
        (*FOLDER, "data.held_out=last", "data.split_at=d", *QUICKLY),
        "data.split_at=d leaves none of the 4 images to validate",
        2,
    ),
    Case(
        "a share that is no share",
        classes(*FOUR),
        (*FOLDER, "data.split_at=20", *QUICKLY),
        "data.split_at=20 must be a number from 0 to 1",
        2,
    ),
    Case(
        "a boundary with the rule of earlier versions, which has none",
        classes(*FOUR),
        (*FOLDER, "data.split_at=0.3", "data.split_seed=null", *QUICKLY),
        "data.split_at=0.3 needs a data.split_seed",
        2,
    ),
    Case(
        "a split seed that is no whole number",
        classes(*FOUR),
        (*FOLDER, "data.split_seed=a", *QUICKLY),
        "data.split_seed=a must be a whole number of at least 0",
        2,
    ),
    Case(
        "a split seed for images that have an official split",
        nothing,
        ("stage=vqgan", "data=cifar10", "data.split_seed=1"),
        "data.split_seed is not a setting of this stage",
        2,
    ),
]


def write_scans(root: Path, folders: tuple[str, ...], highest: int, n: int = 8) -> None:
    """Write n 16-bit grey images, whose values end at `highest`, into each of these folders below a root."""
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for i in range(n):
            random = np.random.default_rng((number, i))
            values = random.integers(0, highest + 1, (20, 20), np.uint16)
            values[0, 0] = highest
            Image.fromarray(values).save(root / name / f"{i}.png")


def ten_bit_scans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans of 10 bits in class folders that are numbers, and a file of a kind that isn't read."""
    write_scans(folder / "scans", ("2", "11", "100"), 1000)
    (folder / "scans" / "2" / "raw.nef").write_bytes(b"x")


def splits_by_other_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two splits in one folder."""
    write_scans(folder / "scans", ("Training Data", "valid_images"), 65_535)


def other_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without an image that is read."""
    (folder / "scans").mkdir()
    (folder / "scans" / "1.nii").write_bytes(b"x")


SCANS = [
    *(word for word in TINY if not word.startswith(("data.n_", "trainer.max_steps"))),
    "stage=vqgan", "data=folder", "data.root=scans", "data.n_val=4", "trainer.max_steps=1",
]  # fmt: skip

# A decision about somebody's data is printed.
SUMMARY: list[Case] = [
    Case(
        "values_of_10_bits_in_16_are_scaled_and_it_is_printed",
        ten_bit_scans,
        (*SCANS, "data.channels=1"),
        "16-bit grey; values 0 to 1,000, of which 0 becomes black and 1,023 white; pixels of 16 bits",
        trains=True,
    ),
    Case(
        "the_names_of_classes_are_printed_with_their_numbers_and_what_is_left_out",
        ten_bit_scans,
        (*SCANS, "data.held_out=last"),
        "classes   3: 0=2 (4), 1=11 (8), 2=100 (8)",
        trains=True,
    ),
    Case(
        "splits_that_become_classes_are_odd",
        splits_by_other_names,
        SCANS,
        "odd: the folders Training Data, valid_images look like splits, and are classes here",
        trains=True,
    ),
    Case(
        "a_range_of_values_is_two_numbers",
        ten_bit_scans,
        (*SCANS, "data.range=1023"),
        "error: data.range=1023 must be auto, percentiles, the values that become the lowest and the highest pixel, as [0,4095]",
        code=2,
    ),
    Case(
        "names_of_classes_are_a_list",
        ten_bit_scans,
        (*SCANS, "data.classes=scans"),
        "error: data.classes=scans must be a list of names in the order of their numbers",
        code=2,
    ),
    Case(
        "alpha_has_two_readings",
        ten_bit_scans,
        (*SCANS, "data.alpha=black"),
        "error: data.alpha=black must be one of white, ignore",
        code=2,
    ),
    Case(
        "a_folder_without_images_says_which_files_it_has",
        other_files,
        SCANS,
        "if these are its images, 1 .nii: convert them",
        code=2,
    ),
]

DRAW = ("stage=sample", "ckpt=model", "n=11", "batch_size=3", "accelerator=cpu", "save=[npz]")


def begin_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior in `model`, and the first two of four batches of its samples in `half`."""
    save_prior_run(folder / "model")
    save, saved = SampleSaver.save, []

    def save_or_stop(saver: SampleSaver, batch: SampleBatch) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(batch.first)
        save(saver, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleSaver, "save", save_or_stop)
        draw_samples(compose_config(*DRAW, "run_dir=half"))


def damage_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_samples(folder, monkeypatch)
    with (folder / "half/.samples.npz.part").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")


def replace_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_samples(folder, monkeypatch)
    save_prior_run(folder / "model", seed=1)


def few_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer_run(folder / "few", "data.n_train=6", "data.n_val=4")


def break_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of a folder of pictures, one of which is none any more."""
    for i in range(4):
        save_picture(torch.full((3, 16, 16), 50 * i, dtype=torch.uint8), folder / f"{i}/a.png")
    root = f"data.root={folder}"
    save_tokenizer_run(folder / "few", "data=folder", root, "data.n_val=1", "data.cache=none")
    (folder / "2/a.png").write_bytes(b"no picture")


def write_loading_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (folder / "flowers").mkdir()
    (folder / "flowers/flowers.py").write_text("raise SystemExit('this was run')")


def write_no_tar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = pytest.importorskip("datasets")
    monkeypatch.setattr(import_module.config, "HF_DATASETS_CACHE", folder / "hf")
    (folder / "shard.tar").write_bytes(b"no tar" * 200)


# Samples are written as they come, and sentences name the settings of the stage at hand.
SAMPLES: list[Case] = [
    Case("half of the samples go on", begin_samples, ("stage=sample", "resume=half"), '"n": 11'),
    Case("the same command goes on", begin_samples, (*DRAW, "run_dir=half"), "6 of 11 samples"),
    Case(
        "a damaged batch is drawn again", damage_samples, (*DRAW, "run_dir=half"), "samples 3 to 5"
    ),
    Case(
        "other samples don't go into the folder",
        begin_samples,
        (*DRAW, "run_dir=half", "sampler.top_p=0.5"),
        "run_dir=half holds a run with sampler.top_p=1.0, and this command has sampler.top_p=0.5",
        2,
    ),
    Case("another model doesn't go on", replace_model, (*DRAW, "run_dir=half"), "another model", 2),
    Case(
        "samples go into shards",
        begin_samples,
        (*DRAW[:-1], "save=shards", "shard_size=4", "run_dir=out"),
        '"shards": "out/shards"',
    ),
    Case(
        "a prior of few images names its own setting",
        few_images,
        ("stage=prior", "ckpt=few", "flip=false", "batch_size=8", "logger=csv"),
        "6 training samples don't fill one batch of 8; use batch_size=6, or less",
        2,
    ),
    Case(
        "a prior's batch of nothing names its own setting",
        few_images,
        ("stage=prior", "ckpt=few", "batch_size=0", "logger=csv"),
        "error: batch_size=0 must be at least 1",
        2,
    ),
    Case(
        "a broken image names a setting that the stage has",
        break_image,
        ("stage=extract", "ckpt=few", "accelerator=cpu"),
        "or leave out all such with data.on_error=skip",
        2,
    ),
    Case(
        "and that setting leaves the image out",
        break_image,
        ("stage=extract", "ckpt=few", "accelerator=cpu", "data.on_error=skip"),
        '"train": 4',
    ),
    Case(
        "a dataset with a loading script is named with a way out",
        write_loading_script,
        ("stage=vqgan", "data=hf", "data.path=flowers"),
        "name the files themselves, as data.path=parquet data.files=<files>",
        2,
    ),
    Case(
        "an exception of no list is a sentence",
        write_no_tar,
        ("stage=vqgan", "data=hf", "data.path=webdataset", "data.files=shard.tar"),
        "data.path=webdataset data.files=shard.tar can't be opened (ReadError: invalid header)",
        2,
    ),
]

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


@pytest.mark.slow
def test_folders_of_any_name_work_from_start_to_end(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = photos.parent / "Füße & mehr (2), a=b #1"
    place.mkdir()
    photos.rename(place / "it's, 写真!")
    data = ["data=folder", f"data.root={place}/it's, 写真!", "data.n_val=8"]
    tiny = [word for word in TINY if not word.startswith("data.n_")]
    name, cache = "name=100% (a=1), é", f"cache_dir={place}/Cache"
    assert command("stage=vqgan", *data, *tiny, name, cache) == 0
    [tokenizer] = Path("runs/vqgan").iterdir()
    assert tokenizer.name == "100% (a=1), é"
    [word] = shlex.split(
        resume_command(tokenizer).removeprefix("resume with: python train.py stage=vqgan")
    )
    assert command("stage=vqgan", word, "trainer.max_steps=8") == 0
    assert command("stage=prior", f"ckpt={tokenizer}", *TINY_PRIOR, name, cache) == 0
    [prior] = Path("runs/prior").iterdir()
    assert (
        command(
            "stage=sample",
            f"ckpt={prior}",
            "n=2",
            "save=[grid,neighbours]",
            "accelerator=cpu",
            cache,
        )
        == 0
    )
    for judged in (tokenizer, prior):
        assert command("stage=evaluate", f"ckpt={judged}", *QUICK, "samples=4", cache) == 0
    capsys.readouterr()
    assert command("stage=report", f"runs=['{tokenizer}','{prior}',runs/evaluate]") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["evaluated"] == 2


@pytest.mark.slow
def test_settings_that_are_text_take_what_looks_like_a_number(command: Command) -> None:
    wandb = ["logger.wandb.project=2026", "logger.wandb.group=1", "logger.wandb.tags=[1,2]"]
    words = ["name=true", "id=20261129", "cache_dir=9", "logger=[wandb,csv]", "logger.csv.name=7"]
    assert command("stage=vqgan", *TINY, *words, *wandb) == 0
    config = OmegaConf.load("runs/vqgan/true/config.yaml")
    assert (config.name, config.id, config.cache_dir) == ("true", "20261129", "9")
    assert OmegaConf.to_container(config.logger.wandb)["tags"] == ["1", "2"]
    assert Path("runs/vqgan/true/7/version_0/metrics.csv").is_file()
    assert command("stage=vqgan", "resume=runs/vqgan/true", "trainer.max_steps=8") == 0
    assert command("stage=evaluate", "ckpt=runs/vqgan/true", *QUICK, "run_dir=1_0") == 0
    assert command("stage=report", "runs=[runs/vqgan/true,1_0]", "name=2024_11_28") == 0
    assert Path("runs/report/2024_11_28/report.html").is_file()
