"""Points of a sweep: finished ones are skipped, interrupted ones resume, failed ones are reported at the end."""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from codegrid.engine.aliases import upgrade_config
from codegrid.engine.cli import explain_error
from codegrid.engine.console import best_effort_write, log_line
from codegrid.engine.errors import InputError
from codegrid.engine.exit_codes import MISTAKE, TERMINATED
from codegrid.engine.figures import clean_figures
from codegrid.engine.folder import (
    CONFIG,
    LAST,
    METRICS,
    PREVIOUS,
    SAMPLES,
    check_name_length,
    is_mere_claim,
)
from codegrid.engine.locks import Lock
from codegrid.engine.places import is_place
from codegrid.engine.texts import expand_home, normalise_texts
from codegrid.engine.trust import flatten_config
from codegrid.engine.version import STAMP
from codegrid.engine.words import clean_key, quote_text

RunFunction = Callable[[DictConfig], dict[str, Any] | None]

# Settings in which two configs of the same run may differ.
APART = ("id", "resume", "run_dir", "sweep", "objective", "trust", "own", "dry_run", STAMP)

# Settings that a run's images decide if they are left open, and that its config then has.
DECIDED = (
    "data.split_at",
    "data.classes",
    "data.suffixes",
    "data.file_column",
    "data.column_names",
    "data.range",
    "data.depth",
    "data.number_type",
    "data.alpha",
    "model",  # of stage=import, by the weights that it reads
)

LEFT_OPEN = (None, "auto", "percentiles")  # what such a setting is until it is decided

STANDS_ON = ("ckpt", "init")  # the settings that name the run on which another one stands

# Groups that a run with `init` takes from the one that it names, apart from what its command sets itself.
ADOPTED_GROUPS = ("model", "quantizer")

MAX_POINT_NAME = 120  # bytes of the swept values in a folder's name

_slots: list[Lock] = []  # locks on the GPUs of this process, held until it ends


def name_sweep(sweep: object, experiment: str | None) -> str:
    """The name of a sweep's folder: `sweep`, else the experiment, else the time of the start."""
    if sweep is not None and (name := str(sweep)):
        if name in (".", "..") or Path(name).name != name:
            raise InputError(
                f"sweep={name} must be the name of one folder below runs/sweeps; a path goes into hydra.sweep.dir=..."
            )
        check_name_length("sweep", name)
        return name
    if experiment and "," not in experiment:
        return experiment
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def find_swept_keys(params: dict[str, str] | None, words: Sequence[str]) -> list[str]:
    """The keys that tell a sweep's points apart: an experiment's `params`, and those with several values on the command line.

    A param to which the command gives a single value stays among them, so the parts of a sweep share their folders' names.
    """
    overrides = OverridesParser.create().parse_overrides(list(words))
    return [
        *(params or {}),
        *(override.get_key_element() for override in overrides if override.is_sweep_override()),
    ]


def name_point(folder: str, number: int, words: Sequence[str], swept: Sequence[str]) -> str:
    """The name of a point's folder, <number>_<key>-<value>...; an existing folder with these values keeps its number."""
    values = "".join(
        "_" + re.sub(r"[^\w.+-]", "-", word)
        for word in sorted(words)
        if word.split("=")[0] in swept
    )
    if len(values.encode()) > MAX_POINT_NAME:
        start = values.encode()[:MAX_POINT_NAME].decode(errors="ignore")
        values = f"{start}-{zlib.crc32(values.encode()):08x}"
    existing = [
        path.name
        for path in Path(folder).glob(f"*{values}")
        if re.fullmatch(r"\d+" + re.escape(values), path.name)
    ]
    return existing[0] if values and existing else f"{number}{values}"


# The cache is copied from the sweep's config to those of its points, so the name and the keys are the same on other machines.
OmegaConf.register_new_resolver("sweep_name", name_sweep, use_cache=True, replace=True)

OmegaConf.register_new_resolver("swept_keys", find_swept_keys, use_cache=True, replace=True)

OmegaConf.register_new_resolver("point_name", name_point, replace=True)


def sweep_folder() -> Path | None:
    """The folder of the sweep to which this run belongs; None outside a sweep."""
    inside = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return Path(HydraConfig.get().sweep.dir) if inside else None


class Sweep(Callback):
    """Creates the sweep's folder before the first job and reports after the last which points failed.

    `folder` and `swept` are parameters so that they are resolved, and cached, before the first job is composed.
    """

    def __init__(self, folder: str, swept: Sequence[str]) -> None:
        self.folder, self.swept = Path(folder), list(swept)
        self.before: dict[Path, int] = {}
        self.borrowed: str | None = None  # the folder of a sweep that writes nothing

    def failures(self) -> dict[Path, int]:
        """Files of failed points, and when each was written (ns)."""
        return {
            file: file.stat().st_mtime_ns for file in sorted((self.folder / "failed").glob("*.txt"))
        }

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if mistake := explain_storage(OmegaConf.select(config, "hydra.sweeper.storage")):
            print(f"error: {mistake}", file=sys.stderr)
            raise SystemExit(MISTAKE)  # Hydra catches all other exceptions of a callback
        if config.dry_run and config.objective:
            print(
                f"error: objective={config.objective} is measured by training, which dry_run=true does not; leave one out",
                file=sys.stderr,
            )
            raise SystemExit(MISTAKE)
        folder = expand_home(str(self.folder))
        if config.dry_run:  # Hydra makes folders of the points, which are removed at the end
            folder = self.borrowed = tempfile.mkdtemp()
        if folder != str(self.folder):  # written in a file
            self.folder = Path(folder)
            config.hydra.sweep.dir = folder
            for_jobs = f"hydra.sweep.dir={quote_text(folder)}"
            config.hydra.overrides.hydra.append(for_jobs)
        try:
            make_locks_folder(self.folder)
        except InputError as error:  # Hydra would print a traceback, and run the points
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(MISTAKE) from error
        self.before = self.failures()
        # Optuna's sweeper logs failures, which run_point reports.
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel("CRITICAL")
        launcher = config.hydra.launcher
        if "joblib" in launcher._target_ and launcher.n_jobs == -1:
            launcher.n_jobs = len(list_gpus()) or -1
        if "submitit" in launcher._target_:  # jobs start in another folder and import this program
            paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        failed = [
            file for file, moment in self.failures().items() if self.before.get(file) != moment
        ]
        texts = {file.stem: file.read_text().strip().splitlines() for file in failed}
        if self.borrowed:
            shutil.rmtree(self.borrowed)
        if failed:
            unwritten = ["its error could not be written"]  # the disk was full
            lines = [f"  {name}: {(text or unwritten)[-1]}" for name, text in texts.items()]
            outlook = (
                "a dry run keeps nothing, so the same command tries all points again"
                if self.borrowed
                else "the same command runs them again and skips what is finished"
            )
            print("\n".join([f"{len(failed)} point(s) failed; {outlook}", *lines]), file=sys.stderr)
            raise SystemExit(MISTAKE)


def explain_storage(storage: str | None) -> str | None:
    """Why Optuna can't keep its study in `storage` here; None if it can. Its version for Hydra reads no study with SQLAlchemy 2."""
    try:
        installed = version("sqlalchemy")
    except PackageNotFoundError:
        return None
    if storage is None or int(installed.split(".")[0]) < 2:
        return None
    return (
        f'hydra.sweeper.storage={storage} needs SQLAlchemy below 2, and {installed} is installed; pip install "sqlalchemy<2", '
        "or leave it out, for the same command resumes a search from the folders of its points"
    )


def run_point(run: RunFunction, config: DictConfig) -> float | None:
    """Run one job of a sweep and return the metric that `objective` names. An error is printed and written to failed/, and the
    next job starts."""
    job = HydraConfig.get()
    sweep, name = Path(job.sweep.dir), str(job.sweep.subdir)
    failure = sweep / "failed" / f"{name}.txt"
    try:
        normalise_texts(config)
        locks = make_locks_folder(sweep)
        failure.unlink(missing_ok=True)
        if "joblib" in job.launcher._target_:
            claim_gpu()
        for key, instead in {"run_dir": "sweep=<name>", "resume": "the same command again"}.items():
            if config[key]:
                raise InputError(
                    f"{key}={config[key]} is for a single run; say {instead}, because a sweep has its own folder"
                )
        if (devices := OmegaConf.select(config, "trainer.devices", default=1)) != 1:
            raise InputError(
                f"trainer.devices={devices} in a sweep; a point has one device, and hydra/launcher=joblib runs several"
            )
        with Lock(locks / name).take():
            swept = list(job.callbacks["sweep"].swept)
            figures = run_once(run, config, sweep / name, swept=swept)
            return read_objective(figures, config.objective)
    except Timeout:
        log_line(f"{sweep / name}: skipped, another process is running it")
    except SystemExit as stop:  # Lightning exits without a code on SIGTERM
        raise SystemExit(stop.code or TERMINATED) from stop
    except Exception as error:
        message = explain_error(error) or traceback.format_exc()
        print(message, file=sys.stderr)
        with best_effort_write(failure):
            failure.parent.mkdir(exist_ok=True)
            failure.write_text(message.rstrip() + "\n")
    return None


def make_locks_folder(sweep: Path) -> Path:
    """The folder of the locks of a sweep's points. Raises InputError if the sweep's folder can't be written."""
    locks = sweep / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        Lock(locks / ".writable").take().release()
    except Timeout:  # another process tests the folder at this moment
        pass
    except OSError as error:
        raise InputError(
            f"can't write the sweep's folder {sweep} ({error.strerror or error}); "
            "name another with sweep=..., or anywhere else with hydra.sweep.dir=..."
        ) from error
    return locks


def run_once(
    run: RunFunction,
    config: DictConfig,
    folder: Path,
    changeable: Sequence[str] = (),
    swept: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The metrics of the run of `config` in `folder`: read if it is finished; else the run resumes or starts.

    Where things are may have changed since it started, except for keys that are `swept`, and so may the `changeable` groups.
    Raises InputError if anything else differs, for then it is another run.
    """
    if (folder / CONFIG).is_file():
        earlier = upgrade_config(OmegaConf.load(folder / CONFIG))
        check_same_run(config, earlier, folder, changeable, swept)
        if (folder / METRICS).is_file():
            log_line(f"{folder}: finished before")
            check_same_data(config, earlier, folder)
            return read_metrics(folder)
        if any(any(folder.rglob(str(file))) for file in (LAST, PREVIOUS, SAMPLES)):
            log_line(f"{folder}: resumes")
            config.resume = str(folder)
        else:  # nothing to resume from; the files may still show why
            set_aside(folder)
    elif is_mere_claim(folder):
        set_aside(folder)
    config.run_dir = str(folder)
    return run(config)


def set_aside(folder: Path) -> None:
    """Rename a folder to the first free name with a leading dot."""
    free = (folder.with_name(f".{folder.name}-{n}") for n in count(1))
    folder.rename(next(path for path in free if not path.exists()))


def check_same_run(
    config: DictConfig,
    earlier: DictConfig,
    folder: Path,
    changeable: Sequence[str],
    swept: Sequence[str],
) -> None:
    """Raise InputError if the run in a folder, with its `earlier` config, is not that of a config."""
    from codegrid.engine.checkpoint import (
        names_same_run,  # imports torch, which --help does without
    )

    for key, mine, theirs in config_differences(config, earlier, swept):
        moved = key in STANDS_ON and key not in swept and names_same_run(mine, folder)
        if not moved and key.split(".")[0] not in changeable:
            raise InputError(
                f"{folder} holds a run with {key}={theirs}, and this one has {key}={mine}; name another folder with sweep=..."
            )


def check_same_data(config: DictConfig, earlier: DictConfig, folder: Path) -> None:
    """Raise InputError if a finished run, or a part of one, was trained on other data than those that a config names in
    another place."""
    data = config.get("data") or {}
    places = {name: value for name, value in data.items() if is_place(config, f"data.{name}")}
    before = earlier.get("data") or {}
    if "_target_" in data and any(before.get(name) != value for name, value in places.items()):
        from codegrid.engine.checkpoint import (
            build_data,  # imports torch, which --help does without
        )

        runs = [folder, *sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))]
        for run in runs:  # what the images of a part have decided holds for the others too
            decided = upgrade_config(OmegaConf.load(run / CONFIG)).get("data") or {}
            before = decided if "_target_" in decided else before
        images = build_data(OmegaConf.merge(before, places))
        for run in runs:
            images.check_recorded(run)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The figures of a finished run. Files that they name are in `folder`, wherever it was when the run ended."""
    try:
        figures: dict[str, Any] = json.loads((folder / METRICS).read_text())
    except ValueError as error:
        raise InputError(
            f"{folder / METRICS} is damaged ({error}); remove it, and the run resumes and writes it again"
        ) from error
    before = str(figures.get("run", folder))
    relocated: dict[str, Any] = replace_folder(figures, before, str(folder))
    return relocated


def replace_folder(value: Any, before: str, now: str) -> Any:
    """A value of JSON in which paths of a folder or below it are those of the place where it is now."""
    if isinstance(value, dict):
        return {name: replace_folder(each, before, now) for name, each in value.items()}
    if isinstance(value, list):
        return [replace_folder(each, before, now) for each in value]
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return now + value[len(before) :]
    return value


def config_difference(config: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first setting in which two configs differ, with both values; None if they describe the same run."""
    return next(config_differences(config, other), None)


def config_differences(
    config: Any, other: Any, swept: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two configs differ, with both values, except for where things are. What is `swept` is no place.

    A setting that one of them lacks, as an earlier version did, is null. What the other's images have decided is no difference,
    nor what it has from the run that `init` names.
    """
    adopts = bool(config.get("init"))
    mine, theirs = flatten_resolved(config), flatten_resolved(other)
    for key in dict.fromkeys((*mine, *theirs)):
        adopted = adopts and key.split(".")[0] in ADOPTED_GROUPS and not is_set_by_command(key)
        differs = mine.get(key) != theirs.get(key) and not is_decided(mine, key) and not adopted
        if (
            differs
            and key.split(".")[0] not in APART
            and (key in swept or not is_place(config, key))
        ):
            yield key, mine.get(key), theirs.get(key)


def is_decided(mine: Mapping[str, Any], key: str) -> bool:
    """Whether a command whose settings are `mine`, by their full keys, leaves a setting to what its run reads."""
    names = [name for name in DECIDED if mine.get(name, ...) in LEFT_OPEN]
    if any(f"{key}.".startswith(f"{name}.") for name in names):
        return True
    if key.startswith("data.") and "data._target_" not in mine and mine.get(key) is None:
        return True  # the images of the run that `ckpt` names
    # Where weights decide the model they decide the bottleneck too, except for what the command says of it.
    return "model" in names and key.startswith("quantizer.") and mine.get(key) is None


def is_set_by_command(key: str) -> bool:
    """Whether a word of this command line sets a dotted key, or chooses a group that it is in."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return any(key == name or key.startswith(f"{name}.") for name in map(clean_key, words))


def flatten_resolved(config: Any) -> dict[str, Any]:
    """The full key and the resolved value of every leaf of a config."""
    return dict(
        flatten_config(OmegaConf.create(OmegaConf.to_yaml(drop_choices(config), resolve=True)))
    )


def drop_choices(config: Any) -> Any:
    """A config without what it chooses again of a checkpoint, which may refer to settings that this stage doesn't have."""
    if "own" not in config:
        return config
    return OmegaConf.masked_copy(config, [key for key in config if key != "own"])


def read_objective(figures: dict[str, Any] | None, objective: str | None) -> float | None:
    """The metric that a sweeper maximises or minimises; InputError if there is no such metric, or if it is no number."""
    if objective is None or figures is None:
        return None
    figures = clean_figures(figures)  # those of an earlier version may have infinities
    if objective in (absent := figures.get("absent") or {}):
        raise InputError(
            f"objective={objective} of {figures.get('run')} can't be compared: {absent[objective]}; "
            "name another metric with objective=..."
        )
    numbers = {
        name: float(value) for name, value in figures.items() if isinstance(value, int | float)
    }
    if objective not in numbers:
        raise InputError(
            f"objective={objective} is not a metric of {figures.get('run')}; there is {', '.join(numbers)}"
        )
    return numbers[objective]


def list_gpus() -> list[str]:
    """The GPUs of this process by their names in CUDA_VISIBLE_DEVICES."""
    import torch  # takes seconds, which --help does without

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def claim_gpu() -> None:
    """Restrict this process to one GPU, a different one from its neighbours' if there are enough.

    The operating system releases the lock when the process ends. A joblib process runs several jobs on the same GPU, because
    a process can't change its GPU once CUDA is initialised.
    """
    gpus = [] if _slots else list_gpus()
    if not gpus:
        return
    for number in count():
        slot = Lock(Path(tempfile.gettempdir()) / f"codegrid-{os.getuid()}-gpu-{number}.lock")
        try:
            slot.take()
        except Timeout:
            continue
        except OSError as error:
            raise InputError(
                f"can't write {slot.file} ({error.strerror or error}), by which processes share "
                "GPUs; name a folder for temporary files with TMPDIR=..."
            ) from error
        _slots.append(slot)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        return
