"""What people meet with their own data, machines and command lines: an input, a command, and what it says or does.

Each row prepares an empty folder, runs one command there in this process, and expects an exit code and a text in what it prints.
Rows are grouped by kind of fault; the tests of each part have the finer cases.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from engine.resume import resume_command
from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings

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


# What is only recorded about a machine may be missing; every wait has an end.
MACHINE: list[Case] = []

# A figure is a number, or null with a reason.
NUMBERS: list[Case] = []

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
            "engine.sweep.version", lambda name: "2.0.1"
        ),
        ("experiment=optuna_tokenizer", "-m", "hydra.sweeper.storage=sqlite:///a=b.db"),
        "hydra.sweeper.storage=sqlite:///a=b.db needs SQLAlchemy below 2",
        2,
    ),
]

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
