"""Rules of the house that no single file can keep."""

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from tests.helpers.configs import ROOT, compose_config

PACKAGES = ["engine", "data", "evaluation", "vqgan", "prior"]  # imports run to the left

OPTIONS = sorted(
    p.relative_to(ROOT / "conf")
    for p in (ROOT / "conf").rglob("*.yaml")
    if p.parent != ROOT / "conf"
)


def imported(file: Path) -> set[str]:
    nodes = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [
        node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in nodes
    ]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    later = set(PACKAGES[PACKAGES.index(package) + 1 :]) | {"train", "tests", "benchmarks"}
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & later, file


def test_train_knows_no_stage_by_name() -> None:
    assert imported(ROOT / "train.py") <= {
        "json",
        "os",
        "pathlib",
        "sys",
        "typing",
        "hydra",
        "omegaconf",
        "engine",
    }


def test_importing_train_does_not_import_torch() -> None:
    """Or --help would take seconds."""
    import subprocess
    import sys

    seen = subprocess.run(
        [sys.executable, "-c", "import sys, train; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == "False"


def test_weights_are_loaded_strictly_and_safely() -> None:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text()
            assert "strict=False" not in text, file
            assert text.count("torch.load(") == text.count("weights_only=True"), file


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_config_says_its_command_and_names_what_exists(option: Path) -> None:
    text = (ROOT / "conf" / option).read_text()
    first = next(line for line in text.splitlines() if "@package" not in line)
    assert first.startswith("# python train.py "), "the first line is the command"
    for target in re.findall(r"^(?:\s*_target_|run): (\S+)$", text, re.MULTILINE):
        get_method(target) if target.split(".")[-1].islower() else get_class(target)


def get_class(target: str) -> type:
    from hydra.utils import get_class

    return get_class(target)


STAGE = {
    "prior": "prior",
    "sampler": "sample",
}  # the stage that a group belongs to; the others are of vqgan

WIRED = (
    "stage",
    "trainer",
    "logger",
    "callbacks",
    "experiment",
    "model",
    "loss",
    "codebook",
    "images",
)  # not one object each

BUILT = [
    option for option in OPTIONS if option.parts[0] not in WIRED and "size" not in option.parts
]


@pytest.mark.parametrize("option", BUILT, ids=str)
def test_every_config_builds_its_object(option: Path, photos: Path) -> None:
    group, name = str(option.parent), option.stem
    overrides = [f"stage={STAGE.get(group, 'vqgan')}", f"{group}={name}"]
    for split in ("train", "val"):
        (photos.parent / split).symlink_to(photos)
    overrides += {  # what a dataset can't be without
        "data/folder": [f"data.root={photos}", "data.n_val=2"],
        "data/ffhq": [f"data.root={photos}", "data.n_val=2"],
        "data/imagenet": [f"data.root={photos.parent}"],
        "data/hf": ["data.path=parquet"],
        "data/litdata": ["data.train=shards"],
    }.get(f"{group}/{name}", [])
    extra: dict[str, Any] = (
        {"codebook": torch.randn(1, 8, 4), "grid": (4, 4)} if group == "prior" else {}
    )
    made = instantiate(compose_config(*overrides)[group], **extra)
    assert made is not None
    if group == "data" and name not in (
        "folder",
        "hf",
        "litdata",
    ):  # these are called as what they read
        assert made.title == name, "a run folder is named as the setting is"


@pytest.mark.parametrize(
    "loss",
    [
        "vqgan",
        "vqgan loss/discriminator=patch",
        "vqvae",
        "vqgan loss/perceptual=lpips loss.perceptual.net=squeeze loss.perceptual.pretrained=false",
    ],
)
def test_every_loss_makes_a_module(loss: str) -> None:
    from vqgan.stages.train import module_from

    chosen = compose_config("stage=vqgan", *f"loss={loss}".split())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = module_from(chosen)
    assert (module.discriminator is None) == (loss == "vqvae")


@pytest.mark.parametrize(
    "experiment", sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
)
def test_every_experiment_composes_and_resolves(experiment: str) -> None:
    text = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    stage = re.search(r"stage=(\w+)", text)
    assert stage
    found = compose_config(f"stage={stage[1]}", f"experiment={experiment}")
    OmegaConf.to_container(found, resolve=True)


def test_the_readmes_commands_compose() -> None:
    lines = re.findall(
        r"^    python train\.py (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(lines) >= 10
    for line in lines:
        words = [word for word in line.split("#")[0].split() if "=" in word]
        compose_config(
            *[re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in words]
        )  # of a sweep its first point


def test_no_file_speaks_of_one_machine() -> None:
    for file in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.lock"),
        ROOT / "Makefile",
        *ROOT.glob("docs/*.md"),
    ]:
        assert not re.search(r"/home/|https?://\S*(simple|packages)\b", file.read_text()), file
