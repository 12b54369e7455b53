"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from data.pictures import save_picture
from engine.checkpoint import make_header, save_atomically
from engine.folder import LAST, append_record, write_config
from prior.saving import SampleBatch, SampleSaver
from prior.stages.sample import draw_samples
from tests.helpers.commands import TINY, Command, lightning_warnings
from tests.helpers.configs import compose_config
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


def nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is needed."""


FIXTURES = Path(__file__).parent / "fixtures" / "run_of_0_1"


def earlier_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two finished runs of a few steps, a tokenizer and a prior, that were moved after they ended."""
    shutil.copytree(FIXTURES, folder / "elsewhere")


def another_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier_runs(folder, monkeypatch)
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
MACHINE: list[Case] = []

# A figure is a number, or null with a reason.
NUMBERS: list[Case] = []

# A value is taken as it is typed.
WORDS: list[Case] = []

# Where things are can change; what a run is can't.
MOVED = [
    Case(
        "a moved run resumes with another cache",
        earlier_runs,
        ("stage=vqgan", "resume=elsewhere/tokenizer", "cache_dir=other", "data.cache=ram"),
        '"run": "elsewhere/tokenizer"',
    ),
    Case(
        "a moved prior resumes by the copy of its tokenizer",
        earlier_runs,
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
        earlier_runs,
        ("stage=sample", "ckpt=elsewhere/prior", "save=neighbours", "data.val_root=x", "n=2"),
        "where its images are can: data.cache, data.cache_dir, ",
        2,
    ),
    Case(
        "a resumed run can't have other shapes",
        earlier_runs,
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
        ("stage=vqgan", "resume=run", "data.root=photos", "data.val_root=photos/cats"),
        "must have the same class folders",
        2,
    ),
]

# Another version, damage and mistrust are three sentences; classes of one's own are admitted by name.
VERSIONS: list[Case] = []

# A split stays when files come or go.
SPLIT: list[Case] = []

# A decision about somebody's data is printed.
SUMMARY: list[Case] = []

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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
