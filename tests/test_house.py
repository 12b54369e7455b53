"""Rules of the house that no single file can keep."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from tests.helpers.configs import ROOT, SMALL, compose_config
from tests.helpers.priors import make_scales

PACKAGES = ["engine", "data", "evaluation", "vqgan", "prior"]  # imports run to the left

OPTIONS = sorted(
    p.relative_to(ROOT / "conf")
    for p in (ROOT / "conf").rglob("*.yaml")
    if p.parent != ROOT / "conf"
)


class Source(NamedTuple):
    """What the rules ask about a file: its tree would take a hundred times the memory."""

    modules: frozenset[
        str
    ]  # the full names of all modules that it imports, those for its types too
    vague: tuple[str, ...]  # variables whose names say nothing, with their lines
    top_level: tuple[str, ...]  # the names that it defines
    lengths: dict[str, int]  # lines per function


@cache
def read_source(file: Path) -> Source:
    """A file, parsed once per process."""
    tree = ast.parse(file.read_text())
    nodes = list(ast.walk(tree))
    return Source(
        frozenset(
            node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
        ),
        tuple(f"line {line}: {name}" for name, line in bound_names(nodes) if name in VAGUE),
        tuple(top_level_names(tree)),
        {
            f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
            for node in nodes
            if isinstance(node, ast.FunctionDef)
        },
    )


def imported_modules(file: Path) -> frozenset[str]:
    return read_source(file).modules


def imported(file: Path) -> set[str]:
    """The packages that a file imports: data for codegrid.data."""
    return {name.removeprefix("codegrid.").split(".")[0] for name in imported_modules(file)}


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith(("vqgan.", "prior.")) else f"codegrid.{name}"


def test_what_others_name_too_is_imported_by_our_own_name() -> None:
    """A module that is imported under two names is there twice, and a user's own data.py must stay theirs."""
    folders = {"conf", "data", "engine", "evaluation"}
    for folder in folders:
        assert (ROOT / "codegrid" / folder).readlink() == Path("..") / folder
    files = [f for part in (*PACKAGES, "tests", "benchmarks") for f in (ROOT / part).rglob("*.py")]
    for file in [*files, ROOT / "train.py"]:
        modules = imported_modules(file)
        assert not [name for name in modules if name.split(".")[0] in folders], file


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    later = set(PACKAGES[PACKAGES.index(package) + 1 :]) | {"train", "tests", "benchmarks"}
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & later, file


def test_no_files_import_each_other_in_a_circle() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    modules = {module_name(file): file for file in files}
    circles = graphlib.TopologicalSorter(
        {name: imported_modules(file) & modules.keys() for name, file in modules.items()}
    )
    circles.prepare()  # raises CycleError with the files of a circle


def test_train_knows_no_stage_by_name() -> None:
    assert imported(ROOT / "train.py") == {"engine"}


FORK = """
import os, sys
{first}
for statement in {statements!r}:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, statement
    else:
        exec(statement)
        print(*sys.modules, flush=True)
        os._exit(0)
"""


def imports_of(*statements: str, first: str = "") -> list[set[str]]:
    """The packages that a fresh process has imported after each statement alone, or after `first` and that statement."""
    process = subprocess.run(
        [sys.executable, "-c", FORK.format(first=first, statements=statements)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [{name.split(".")[0] for name in line.split()} for line in process.stdout.splitlines()]


def test_importing_train_does_not_import_torch() -> None:
    """Or --help would take seconds."""
    [packages] = imports_of("import train")
    assert "hydra" in packages
    assert "torch" not in packages


def test_importing_a_model_imports_no_trainer() -> None:
    """A notebook waits for torch alone."""
    both = imports_of(
        "from vqgan import Tokenizer", "from prior import Prior", first="import torch"
    )
    for packages, name in zip(both, ("vqgan", "prior"), strict=True):
        assert {"torch", name} <= packages
        assert not packages & {
            "lightning",
            "hydra",
            "wandb",
            "torchmetrics",
            "torchvision",
            "scipy",
        }


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
    "student": "distill",
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
    "places",
    "networks",
)  # not one object each

BUILT = [
    option
    for option in OPTIONS
    if option.parts[0] not in WIRED and not {"size", "head"} & set(option.parts)
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
    if group == "student":
        extra = {"image_size": 16, "channels": 3, "grid": 4}  # the teacher's
    if f"{group}/{name}" == "prior/var":
        extra["scales"] = make_scales((4, 4))
    built = instantiate(compose_config(*overrides)[group], **extra)
    assert built is not None
    if group == "data" and name not in (
        "folder",
        "hf",
        "litdata",
    ):  # these are called as what they read
        assert built.title == name, "a run folder is named as the setting is"


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
    from codegrid.engine.settings import TrainerSettings
    from vqgan.stages.building import build_module

    chosen = compose_config(*SMALL, *f"loss={loss}".split())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = build_module(chosen, TrainerSettings.read(chosen.trainer))
    assert (module.discriminator is None) == (loss == "vqvae")


@pytest.mark.parametrize(
    "experiment", sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
)
def test_every_experiment_composes_and_resolves(experiment: str) -> None:
    text = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    stage = re.search(r"stage=(\w+)", text)
    assert stage
    config = compose_config(f"stage={stage[1]}", f"experiment={experiment}")
    OmegaConf.to_container(config, resolve=True)


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


SOURCES = sorted(
    file
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
    if file.name != "__init__.py"
)
ALL_SOURCES = [
    *SOURCES,
    ROOT / "train.py",
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]
VAGUE = {
    "found",
    "told",
    "made",
    "said",
    "seen",
    "given",
    "kept",
}  # say indices, label, module, message, train


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def is_stage(file: Path) -> bool:
    """Whether a file holds the function of a stage, which conf/stage names."""
    return file.parent.name == "stages" or relative(file) == "evaluation/report/stage.py"


def bound_names(nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
    """Every name that is assigned to, or that is a parameter, and its line."""
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


@pytest.mark.parametrize("file", ALL_SOURCES, ids=relative)
def test_no_variable_has_a_name_that_says_nothing(file: Path) -> None:
    assert not read_source(file).vague


def top_level_names(tree: ast.Module) -> list[str]:
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [
                name.id
                for target in node.targets
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return names


def test_a_top_level_name_is_defined_once() -> None:
    homes: dict[str, list[str]] = {}
    for file in SOURCES:
        for name in read_source(file).top_level:
            homes.setdefault(name, []).append(relative(file))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


@pytest.mark.parametrize("file", [*SOURCES, ROOT / "train.py"], ids=relative)
def test_no_function_is_longer_than_60_lines(file: Path) -> None:
    lengths = read_source(file).lengths
    assert not {name: length for name, length in lengths.items() if length > 60}


@pytest.mark.parametrize("file", [f for f in SOURCES if is_stage(f)], ids=relative)
def test_a_stage_is_shorter_than_60_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 60


def test_a_default_stands_in_conf_or_in_the_constructor_not_in_both() -> None:
    from hydra.utils import get_object

    from tests.helpers.parts import defaults_by_target

    twice = {}
    for target, settings in defaults_by_target().items():
        if target.removeprefix("codegrid.").split(".")[0] not in PACKAGES:
            continue
        parameters = inspect.signature(get_object(target)).parameters
        both = [
            k
            for k in settings
            if k in parameters and parameters[k].default is not inspect.Parameter.empty
        ]
        if both:
            twice[target] = both
    assert not twice


READS_CONFIGS = {  # files other than the stages that take a config as Hydra composed it
    "engine/aliases.py", "engine/command.py", "engine/places.py", "engine/resume.py", "engine/run.py", "engine/settings.py",
    "engine/sweep.py", "engine/texts.py", "engine/trust.py",
}  # fmt: skip


@pytest.mark.parametrize("file", [f for f in SOURCES if not is_stage(f)], ids=relative)
def test_nothing_below_a_stage_takes_a_config(file: Path) -> None:
    if relative(file) not in READS_CONFIGS:
        assert "DictConfig" not in file.read_text()


HASHES_JSON = ("data/store.py", "evaluation/report/groups.py")  # keys, which hold no figures


@pytest.mark.parametrize("file", [*SOURCES, ROOT / "train.py"], ids=relative)
def test_figures_are_written_as_strict_json(file: Path) -> None:
    """json.dumps writes Infinity and NaN, which other programs refuse; engine.figures.format_figures writes null."""
    text = file.read_text()
    lenient = text.count("json.dumps(") - text.count("allow_nan=False")
    assert lenient == (relative(file) in HASHES_JSON)


def test_no_test_file_imports_from_another() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        for module in imported_modules(file):
            assert not module.startswith("tests") or module.startswith("tests.helpers"), file


def test_an_installed_program_has_all_packages_and_their_files() -> None:
    """test_wheel.py installs it; this one says at once what a new file lacks."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    included = {name.rstrip("*") for name in described["packages"]["find"]["include"]}
    assert included == {"codegrid", "vqgan", "prior"}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*"):
            if not file.is_file() or file.suffix == ".pyc":
                continue
            assert (file.parent / "__init__.py").is_file(), file
            if file.suffix != ".py":
                package_name = module_name(file.parent / "x").rpartition(".")[0]
                patterns = described["package-data"][package_name]
                assert any(fnmatch(file.name, pattern) for pattern in patterns), file
