"""The points of a sweep: what is finished is left out, what broke off goes on, what fails is told at the end."""

import json
import logging
import os
import re
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.aliases import upgrade_config
from engine.cli import explain_error
from engine.console import log_line
from engine.errors import InputError
from engine.exit_codes import TERMINATED
from engine.trust import flatten_config

RunFunction = Callable[[DictConfig], dict[str, Any] | None]

APART = ("id", "resume", "run_dir", "sweep", "objective")  # settings that make no other run of it

CHECKPOINTS = ("last.ckpt", "previous.ckpt")  # what a run can go on from

LONGEST = 120  # characters of a folder's name that say which point it is of

_slots: list[FileLock] = []  # this process's share of the GPUs, held until it ends


def name_sweep(sweep: str | None, experiment: str | None) -> str:
    """What a sweep's folder is called: its own name, that of its experiment, or else the moment when it was started."""
    if sweep and (str(sweep) in (".", "..") or Path(str(sweep)).name != str(sweep)):
        raise InputError(
            f"sweep={sweep} must be the name of one folder below runs/sweeps; a path goes into hydra.sweep.dir=..."
        )
    if sweep or (experiment and "," not in experiment):
        return str(sweep or experiment)
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def find_swept_keys(params: dict[str, str] | None, words: Sequence[str]) -> list[str]:
    """The keys that tell a sweep's points apart: those of an experiment's `params`, and those to which the command's words
    give several values. What a word says alone of a param stays in the name: all of the sweep's parts go by the same ones."""
    said = OverridesParser.create().parse_overrides(list(words))
    return [
        *(params or {}),
        *(override.get_key_element() for override in said if override.is_sweep_override()),
    ]


def name_point(folder: str, number: int, words: Sequence[str], swept: Sequence[str]) -> str:
    """The folder of a point below the sweep's, <number>_<key>-<value>...: the one that it has, whatever its number was then."""
    told = "".join(
        "_" + re.sub(r"[^\w.+-]", "-", word)
        for word in sorted(words)
        if word.split("=")[0] in swept
    )
    if len(told) > LONGEST:
        told = f"{told[:LONGEST]}-{zlib.crc32(told.encode()):08x}"
    before = [
        path.name
        for path in Path(folder).glob(f"*{told}")
        if re.fullmatch(r"\d+" + re.escape(told), path.name)
    ]
    return before[0] if told and before else f"{number}{told}"


# Cached, what the sweep's own config says of the whole holds for each of its points, on other machines too.
OmegaConf.register_new_resolver("named", name_sweep, use_cache=True, replace=True)

OmegaConf.register_new_resolver("swept", find_swept_keys, use_cache=True, replace=True)

OmegaConf.register_new_resolver("place", name_point, replace=True)


def sweep_folder() -> Path | None:
    """The folder of the sweep that this run is a point of."""
    inside = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return Path(HydraConfig.get().sweep.dir) if inside else None


class Sweep(Callback):
    """What the command does around its jobs: it makes their folder, and tells at the end which of them failed.

    `folder` and `swept` are asked for here, that they are known before the first job is.
    """

    def __init__(self, folder: str, swept: Sequence[str]) -> None:
        self.folder, self.swept = Path(folder), list(swept)
        self.before: dict[Path, int] = {}

    def failures(self) -> dict[Path, int]:
        """The files of what has failed, and when they were written."""
        return {
            file: file.stat().st_mtime_ns for file in sorted((self.folder / "failed").glob("*.txt"))
        }

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = self.failures()
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(
            "CRITICAL"
        )  # it counts failures, which `point` tells
        launcher = config.hydra.launcher
        if "joblib" in launcher._target_ and launcher.n_jobs == -1 and (found := list_gpus()):
            launcher.n_jobs = len(found)
        if (
            "submitit" in launcher._target_
        ):  # its jobs are started somewhere else, and have to find this program
            paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        failed = [
            file for file, moment in self.failures().items() if self.before.get(file) != moment
        ]
        if failed:
            lines = [
                f"  {file.stem}: {file.read_text().strip().splitlines()[-1]}" for file in failed
            ]
            told = f"{len(failed)} point(s) failed; the same command makes up for them and leaves out what is finished"
            print("\n".join([told, *lines]), file=sys.stderr)
            raise SystemExit(2)  # the one kind of exception that Hydra lets a callback raise


def run_point(run: RunFunction, config: DictConfig) -> float | None:
    """One job of a sweep, and the figure that `objective` names; its mistake is told and kept, and doesn't end the others."""
    job = HydraConfig.get()
    sweep, name = Path(job.sweep.dir), str(job.sweep.subdir)
    mistake = sweep / "failed" / f"{name}.txt"
    mistake.unlink(missing_ok=True)
    (sweep / ".locks").mkdir(parents=True, exist_ok=True)
    if "joblib" in job.launcher._target_:
        claim_gpu()
    try:
        for key, instead in {"run_dir": "sweep=<name>", "resume": "the same command again"}.items():
            if config[key]:
                raise InputError(
                    f"{key}={config[key]} is of a single run; say {instead}, for a sweep has a folder of its own"
                )
        if (devices := OmegaConf.select(config, "trainer.devices", default=1)) != 1:
            raise InputError(
                f"trainer.devices={devices} in a sweep; its points have one device each, several with hydra/launcher=joblib"
            )
        with FileLock(sweep / ".locks" / name, timeout=0):
            return read_objective(run_once(run, config, sweep / name), config.objective)
    except Timeout:
        log_line(f"{sweep / name}: left to another process, which is at it")
    except SystemExit as stop:  # Lightning's answer to Ctrl-C and to SIGTERM, then without a code
        raise SystemExit(stop.code or TERMINATED) from stop
    except Exception as error:
        told = explain_error(error) or traceback.format_exc()
        print(told, file=sys.stderr)
        mistake.parent.mkdir(exist_ok=True)
        mistake.write_text(told.rstrip() + "\n")
    return None


def run_once(run: RunFunction, config: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The figures of the run of `config` in `folder`: those that it has, where it is finished; else it goes on, or begins."""
    if (folder / "config.yaml").is_file():
        if differs := config_difference(
            config, upgrade_config(OmegaConf.load(folder / "config.yaml"))
        ):
            key, mine, theirs = differs
            raise InputError(
                f"{folder} holds a run with {key}={theirs}, and this one has {key}={mine}; name another folder with sweep=..."
            )
        if (folder / "metrics.json").is_file():
            log_line(f"{folder}: finished before")
            try:
                figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
            except ValueError as error:
                raise InputError(
                    f"{folder / 'metrics.json'} is damaged ({error}); remove it and the run goes on to make it anew"
                ) from error
            return figures
        if any(found for name in CHECKPOINTS for found in folder.rglob(f"checkpoints/{name}")):
            log_line(f"{folder}: goes on")
            config.resume = str(folder)
        else:  # nothing to go on from; what there is may still tell somebody why
            free = (folder.with_name(f".{folder.name}-{n}") for n in count(1))
            folder.rename(next(path for path in free if not path.exists()))
    config.run_dir = str(folder)
    return run(config)


def config_difference(config: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first setting in which two configs differ, and both its values; None where they are of the same run."""
    mine, theirs = (
        dict(flatten_config(OmegaConf.create(OmegaConf.to_yaml(made, resolve=True))))
        for made in (config, other)
    )
    for key in (*mine, *theirs):
        if key.split(".")[0] not in APART and (
            key not in mine or key not in theirs or mine[key] != theirs[key]
        ):
            return key, mine.get(key), theirs.get(key)
    return None


def read_objective(figures: dict[str, Any] | None, objective: str | None) -> float | None:
    """The figure that a sweeper is to make high or low."""
    if objective is None or figures is None:
        return None
    numbers = {
        name: float(value) for name, value in figures.items() if isinstance(value, int | float)
    }
    if objective not in numbers:
        raise InputError(
            f"objective={objective} is no figure of {figures.get('run')}; there is {', '.join(numbers)}"
        )
    return numbers[objective]


def list_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    import torch  # here, for a command that only asks for help can do without

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def claim_gpu() -> None:
    """Let this process see one GPU, another than its neighbours' as long as there are enough.

    By a lock that the system frees with the process: joblib's processes do several jobs each, and once CUDA has begun, a
    process can't change its GPU any more.
    """
    if _slots or not (found := list_gpus()):
        return
    for number in count():
        slot = FileLock(Path(tempfile.gettempdir()) / f"codegrid-{os.getuid()}-gpu-{number}.lock")
        try:
            slot.acquire(timeout=0)
        except Timeout:
            continue
        _slots.append(slot)
        os.environ["CUDA_VISIBLE_DEVICES"] = found[number % len(found)]
        return
