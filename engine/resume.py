"""Resuming a run: its config as it was, with what this command may change."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from engine.aliases import upgrade_config
from engine.checkpoint import find_resumable
from engine.environment import read_overrides
from engine.errors import InputError
from engine.folder import CONFIG
from engine.sweep import config_difference, config_differences, sweep_folder
from engine.trust import OTHERS, check_trusted, flatten_config

CHANGEABLE = ("trainer", "logger", "resume", "stage")  # groups that a resumed run may change

# Settings that a run which repeats may change: where it runs and where things are. What the files contain is checked.
PLACES_OF_REPEATED = (
    "ckpt", "cache_dir", "data", "accelerator", "batch_size", "sampler.init_image", "name",
)  # fmt: skip


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
        if override.lstrip("+~").split("=")[0].split(".")[0] not in CHANGEABLE:
            raise InputError(
                f"resume continues {config.resume} as it was, so {override} can't change; "
                "only trainer.* and logger.* can"
            )
    if not has_parts:
        find_resumable(Path(config.resume))
    earlier.trainer = OmegaConf.merge(config.trainer, earlier.trainer)  # it may lack newer settings
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


def resolve_repeated(config: DictConfig) -> DictConfig:
    """The config of the run that goes on: the one that `resume` names, or one that the same command began in `run_dir`.

    A config of neither is returned as it is. Raises InputError for a setting that differs and says what the run is.
    """
    named = "resume" if config.resume else "run_dir"
    folder = config[named]
    if not config.resume and not (folder and holds_run_of(config.stage, Path(folder))):
        return config
    resuming = config.copy()
    resuming.resume = folder
    earlier = read_earlier_config(resuming)
    check_trusted_run(config, earlier, Path(folder) / CONFIG)
    merged: Any = OmegaConf.merge(config, earlier)  # the earlier one may lack newer settings
    words = [word.lstrip("+~").split("=")[0] for word in read_overrides()]
    for place, *_ in config_differences(config, merged):
        key = re.sub(r"(\.\d+)+$", "", place)  # a list as a whole
        mine, theirs = OmegaConf.select(config, key), OmegaConf.select(merged, key)
        if config.resume and not _is_below(
            key, words
        ):  # a default, which this command doesn't ask for
            continue
        if not _is_below(key, PLACES_OF_REPEATED):
            raise InputError(
                f"{named}={folder} holds a run with {key}={theirs}, and this command has {key}={mine}; "
                f"leave {key} as it was, or name another folder with run_dir=..."
            )
        OmegaConf.update(merged, key, mine)
    merged.resume = merged.run_dir = folder
    resolved: DictConfig = merged
    return resolved


def holds_run_of(stage: str, folder: Path) -> bool:
    """Whether a folder has the config.yaml of a run of this stage."""
    file = folder / CONFIG
    return file.is_file() and f"stage: {stage}" in file.read_text(errors="replace").splitlines()


def _is_below(key: str, groups: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or lies in one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def read_earlier_config(config: DictConfig) -> DictConfig:
    """The config.yaml of the run folder that `resume` names, with the names of today."""
    file = Path(config.resume) / CONFIG
    if not file.is_file():
        raise InputError(
            f"resume={config.resume} is not a run folder ({file} is missing); "
            "give one such as runs/vqgan/shapes"
        )
    try:
        earlier = upgrade_config(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(
            f"{file} is damaged ({' '.join(str(error).split())}); "
            "resume another run, or restore the file"
        ) from error
    if not isinstance(earlier, DictConfig) or not {"stage", "run"} <= earlier.keys():
        raise InputError(
            f"{file} is damaged or no config of a run; resume another run, or restore the file"
        )
    if earlier.stage != config.stage:
        raise InputError(
            f"resume={config.resume} is a run of stage={earlier.stage}; "
            f"say stage={earlier.stage} resume=..."
        )
    return earlier


def check_trusted_run(config: DictConfig, earlier: DictConfig, file: Path) -> None:
    """Raise InputError if an earlier config asks for anything but Codegrid's classes, Lightning's, torch's optimizers,
    and what this command names itself. Run folders are passed on from hand to hand."""
    current = dict(flatten_config(config))
    own_targets = {str(value) for key, value in current.items() if key.endswith("_target_")}
    check_trusted(earlier, str(file), OTHERS | own_targets)
    for key, value in flatten_config(earlier):
        if key.rpartition(".")[2] == "run" and value != current.get(key):
            raise InputError(
                f"{file} says {key}={value}, which is no stage of Codegrid; don't trust the file"
            )


def resume_command(folder: Path) -> str:
    """How to resume the run in a folder, or the pipeline or sweep it is part of, as text for the user."""
    whole = folder.parent if (folder.parent / CONFIG).is_file() else folder
    if sweep_folder():
        return "the same command again continues the sweep"
    stage: Any = OmegaConf.load(whole / CONFIG).stage
    return f"resume with: python train.py stage={stage} {shlex.quote(f'resume={os.fspath(whole)}')}"
