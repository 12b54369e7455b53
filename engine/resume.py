"""Resuming a run: its config as it was, with what this command may change."""

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from engine.aliases import upgrade_config
from engine.checkpoint import find_resumable
from engine.console import log_line
from engine.environment import read_overrides
from engine.errors import InputError
from engine.folder import CONFIG, RECORD
from engine.sweep import config_difference, sweep_folder
from engine.trust import (
    OTHERS,
    Trust,
    check_trusted,
    flatten_config,
    format_trust,
    is_lacking,
    is_ours,
)
from engine.version import STAMP, Stamp, check_format, refuse_version

# Groups that a resumed run may change, and words that say what is trusted in its files.
CHANGEABLE = ("trainer", "logger", "resume", "stage", "trust", "own")


def resolve_resumed(config: DictConfig, has_parts: bool) -> DictConfig:
    """The config of the run that `resume` names, with this command's trainer.* and logger.*.

    Raises InputError if the folder holds no run of this stage, if its config asks for something that is not part of
    Codegrid, if this command changes anything else, or if there is no checkpoint. A run that `has_parts` (a pipeline)
    looks for the checkpoints of its parts itself.
    """
    earlier = read_earlier_config(config)
    check_trusted_run(config, earlier, Path(config.resume) / CONFIG)
    overrides = [word for word in read_overrides() if "=" in word]
    if not config_difference(config, earlier):  # a sweep's point repeats its own overrides
        overrides = []
    for override in overrides:
        named = override.lstrip("+~").split("=")[0].split("@")[-1]
        if named.split(".")[0] not in CHANGEABLE and not repeats_own_class(config, earlier, named):
            raise InputError(
                f"resume continues {config.resume} as it was, so {override} can't change; "
                "only trainer.* and logger.* can"
            )
    if not has_parts:
        find_resumable(Path(config.resume))
    earlier.trainer = OmegaConf.merge(config.trainer, earlier.trainer)  # it may lack newer settings
    for key in config.keys() - earlier.keys():
        if not OmegaConf.is_config(config[key]):
            earlier[key] = config[key]
    earlier.trust = config.trust
    OmegaConf.set_struct(earlier, True)
    for override in overrides:
        key = override.split("=")[0]
        if key.startswith("trainer."):
            OmegaConf.update(earlier, key, OmegaConf.select(config, key))
        elif key.startswith("logger"):
            earlier.logger = config.logger
    earlier.resume = config.resume
    earlier.run_dir = config.resume
    return earlier


def read_earlier_config(config: DictConfig) -> DictConfig:
    """The config.yaml of the run folder that `resume` names, with the names of today."""
    file = Path(config.resume) / CONFIG
    if not file.is_file():
        raise InputError(
            f"resume={config.resume} is not a run folder ({file} is missing); "
            "give one such as runs/vqgan/shapes"
        )
    try:
        loaded = OmegaConf.load(file)
        check_format(file, Stamp.read(loaded.get(STAMP) if isinstance(loaded, DictConfig) else {}))
        earlier = upgrade_config(loaded)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(
            f"{file} is damaged ({' '.join(str(error).split())}); "
            "resume another run, or restore the file"
        ) from error
    if not isinstance(earlier, DictConfig) or not {"stage", "run", "trainer"} <= earlier.keys():
        raise InputError(
            f"{file} is damaged or no config of a run; resume another run, or restore the file"
        )
    earlier.pop(STAMP, None)
    if earlier.stage != config.stage:
        raise InputError(
            f"resume={config.resume} is a run of stage={earlier.stage}; "
            f"say stage={earlier.stage} resume=..."
        )
    return earlier


def repeats_own_class(config: DictConfig, earlier: DictConfig, key: str) -> bool:
    """Whether a word such as data=mine or data._target_=mydata.Mine only chooses again, and so admits, the class of the user's
    own that the run has."""
    path = key.replace("/", ".").removesuffix("._target_")
    targets = [OmegaConf.select(each, f"{path}._target_") for each in (config, earlier)]
    return targets[0] is not None and targets[0] == targets[1] and not is_ours(targets[0])


def read_stamp(file: Path) -> Stamp:
    """Which program wrote a config.yaml."""
    written: Any = OmegaConf.load(file)
    return Stamp.read(written.get(STAMP))


def check_trusted_run(config: DictConfig, earlier: DictConfig, file: Path) -> None:
    """Raise InputError if an earlier config asks for anything but Codegrid's classes, Lightning's, torch's optimizers,
    and what this command trusts or names itself. Run folders are passed on from hand to hand."""
    stamp = read_stamp(file)
    check_trusted(earlier, str(file), OTHERS | Trust.read(config).names, stamp)
    current = dict(flatten_config(config))
    for key, value in flatten_config(earlier):
        if key.rpartition(".")[2] == "run" and value != current.get(key):
            if is_lacking(value) and not stamp.is_current:
                raise refuse_version(file, stamp, f"it has no {value}")
            raise InputError(
                f"{file} says {key}={value}, which is no stage of Codegrid; don't trust the file"
            )


def report_other_threads(folder: Path, origin: Mapping[str, Any]) -> None:
    """Print that a run on a CPU ran with another number of threads before: sums are then rounded otherwise."""
    before: Any = None
    with suppress(
        OSError, ValueError, LookupError
    ):  # an earlier run's record may be missing, or cut off
        before = json.loads((folder / RECORD).read_text().splitlines()[-1])["threads"]
    if isinstance(before, int) and before != origin["threads"]:
        log_line(
            f"{folder} ran with {before} threads and resumes with {origin['threads']}: on a CPU it ends equal to an "
            f"uninterrupted run up to rounding, and to the bit with OMP_NUM_THREADS={before}"
        )


def resume_command(folder: Path) -> str:
    """How to resume the run in a folder, or the pipeline or sweep it is part of, as text for the user."""
    whole = folder.parent if (folder.parent / CONFIG).is_file() else folder
    if sweep_folder():
        return "the same command again continues the sweep"
    written: Any = OmegaConf.load(whole / CONFIG)
    words = [f"stage={written.stage}", f"resume={os.fspath(whole)}"]
    if written.get("trust"):
        words.append(format_trust(written.trust))
    return f"resume with: python train.py {shlex.join(words)}"
