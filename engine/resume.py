"""Resuming a run: its config as it was, with what this command may change."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from codegrid.engine.aliases import upgrade_config
from codegrid.engine.checkpoint import find_resumable
from codegrid.engine.console import log_line
from codegrid.engine.environment import read_overrides
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG, RECORD, write_config
from codegrid.engine.places import is_place, list_places
from codegrid.engine.session import format_command
from codegrid.engine.sweep import APART, flatten_resolved, is_decided, sweep_folder
from codegrid.engine.trust import (
    OTHERS,
    Trust,
    check_trusted,
    flatten_config,
    format_trust,
    is_lacking,
    is_ours,
)
from codegrid.engine.version import STAMP, Stamp, check_format, refuse_version
from codegrid.engine.words import clean_key, format_word

# What a run that repeats may change beside its places; what the files contain is checked, and the images don't depend on batches.
ALSO_CHANGEABLE = (
    "ckpt", "condition", "decoder", "batch_size", "sampler.init_image", "name", "hub", "private", "replace",
)  # fmt: skip
MOVABLE = (
    "ckpt",
    "condition",
)  # what may lie elsewhere when a run resumes; its stage checks that it is the same


def resolve_resumed(config: DictConfig, has_parts: bool) -> DictConfig:
    """The config of the run that `resume` names, with this command's trainer.*, logger.* and places (see engine/places.py).

    Raises InputError if the folder holds no run of this stage, if its config asks for something that is not part of
    Codegrid, if this command changes anything else, or if there is no checkpoint. A run that `has_parts` (a pipeline)
    looks for the checkpoints of its parts itself.
    """
    earlier = read_earlier_config(config)
    check_trusted_run(config, earlier, Path(config.resume) / CONFIG)
    changes = list_changes(config, earlier)
    if not has_parts:
        find_resumable(Path(config.resume))
    earlier.trainer = OmegaConf.merge(config.trainer, earlier.trainer)  # it may lack newer settings
    if "data" in earlier and "_target_" not in earlier.data:
        earlier.data = OmegaConf.merge(config.data, earlier.data)
    for key in [*changes, *list_followers(config, changes)]:
        # One word about a logger decides which loggers there are.
        group = "logger" if key.split(".")[0] == "logger" else key
        value = OmegaConf.select(config, group)
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        OmegaConf.update(earlier, group, value, merge=False, force_add=True)
    for name in config.keys() - earlier.keys():
        if not OmegaConf.is_config(config[name]):
            earlier[name] = config[name]
    earlier.trust = config.trust
    earlier.dry_run = config.get("dry_run", False)
    OmegaConf.set_struct(earlier, True)
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
    base = config.copy()
    OmegaConf.set_struct(
        base, False
    )  # an import's run has a model and quantizer that its command lacks
    merged: Any = OmegaConf.merge(base, earlier)  # the earlier one may lack newer settings
    OmegaConf.set_struct(merged, True)
    mine_by_key = flatten_resolved(config)
    words = [clean_key(word) for word in read_overrides()]
    changes = []
    for place in differing_keys(config, merged):
        if is_decided(mine_by_key, place):
            continue
        key = re.sub(r"(\.\d+)+$", "", place)  # a list as a whole
        mine, theirs = OmegaConf.select(config, key), OmegaConf.select(merged, key)
        if config.resume and not is_below(key, words):  # a default, not what this command asks for
            continue
        if not is_place(merged, key) and not is_below(key, ALSO_CHANGEABLE):
            raise InputError(
                f"{named}={folder} holds a run with {key}={theirs}, and this command has {key}={mine}; "
                f"leave {key} as it was, or name another folder with run_dir=..."
            )
        changes.append(key)
    for key in (*changes, *list_followers(config, changes)):
        OmegaConf.update(merged, key, OmegaConf.select(config, key))
    merged.resume = merged.run_dir = folder
    merged.dry_run = config.get("dry_run", False)
    resolved: DictConfig = merged
    return resolved


def holds_run_of(stage: str, folder: Path) -> bool:
    """Whether a folder has the config.yaml of a run of this stage."""
    file = folder / CONFIG
    return file.is_file() and f"stage: {stage}" in file.read_text(errors="replace").splitlines()


def is_below(key: str, groups: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or lies in one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def list_changes(config: DictConfig, earlier: DictConfig) -> list[str]:
    """The keys in which a resumed run takes this command's values instead of its earlier ones.

    On the command line these are the words beside `resume`; a word that repeats the earlier value is none. A point of a sweep
    or a part of a pipeline that goes on has a whole config, which holds for all that may change.
    """
    differing = differing_keys(config, earlier)
    overrides = [word for word in read_overrides() if "=" in word]
    if not is_named(config.resume, overrides):
        whole = flatten_resolved(config)
        changes = [key for key in differing if is_changeable(earlier, key)]
        return [
            key
            for key in changes
            if (key in whole or key.split(".")[0] == "logger") and not is_decided(whole, key)
        ]
    others = [key for key in differing if not is_changeable(earlier, key)]
    keys = {clean_key(word): word for word in overrides}
    changes = []
    # Settings come before the groups that they are in, so that a refusal names the setting.
    for key in sorted(keys, key=lambda key: -key.count(".")):
        if key in ("resume", "stage", "trainer", "trust", "dry_run"):
            continue
        if is_changeable(earlier, key):
            changes.append(key)
        elif others and not (
            is_repeated(config, key, others) or repeats_own_class(config, earlier, key)
        ):
            raise InputError(
                f"resume continues {config.resume} as it was, so {keys[key].lstrip('+~')} can't change; "
                "only trainer.*, logger.* and where things are can: "
                f"{', '.join([*(['ckpt'] if 'ckpt' in earlier else []), *list_places(earlier)])}"
            )
    return changes


def is_named(resume: str, overrides: Sequence[str]) -> bool:
    """Whether the command line itself names the run to resume, instead of a sweep or pipeline that it is part of."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [override.value() for override in parsed if override.get_key_element() == "resume"]
    return resume in values or os.path.abspath(resume) in [
        os.path.abspath(os.path.expanduser(str(value))) for value in values
    ]


def is_changeable(earlier: DictConfig, key: str) -> bool:
    """Whether a resumed run, or a part of a resumed pipeline, may take another value.

    The stage itself checks that what a run stands on is the same in another place.
    """
    words = set(key.split("."))
    return key in MOVABLE or bool({"trainer", "logger"} & words) or is_place(earlier, key)


def differing_keys(config: DictConfig, earlier: DictConfig) -> list[str]:
    """The keys of settings in which this command's config differs from that of the earlier run, without those of the run itself."""
    mine, theirs = flatten_resolved(config), flatten_resolved(earlier)
    return [
        key
        for key in dict.fromkeys((*mine, *theirs))
        if key.split(".")[0] not in APART and mine.get(key) != theirs.get(key)
    ]


def is_repeated(config: DictConfig, key: str, others: Sequence[str]) -> bool:
    """Whether a setting or group of this command's config is in none of the `others`, which differ from the earlier run's."""
    if any(other == key or other.startswith(f"{key}.") for other in others):
        return False
    *parents, name = key.split(".")
    parent = OmegaConf.select(config, ".".join(parents)) if parents else config
    return isinstance(parent, DictConfig) and name in parent


def list_followers(config: DictConfig, changes: Sequence[str]) -> list[str]:
    """The keys of settings that refer to one of `changes` in conf/, as data.cache_dir to cache_dir."""
    return [
        key
        for key, value in flatten_config(config)
        if key not in changes and str(value) in {f"${{{change}}}" for change in changes}
    ]


def write_places(folder: Path, config: DictConfig) -> None:
    """Write where things are now into config.yaml of a run that was resumed, for the next command; the rest of it stays."""
    earlier: Any = OmegaConf.load(folder / CONFIG)
    upgraded = upgrade_config(earlier)
    moved = [
        key
        for key in differing_keys(config, upgraded)
        if (key in MOVABLE or is_place(config, key))
        and not {"trainer", "logger"} & set(key.split("."))
    ]
    for key in moved:
        OmegaConf.update(earlier, key, OmegaConf.select(config, key), merge=False, force_add=True)
    if moved:
        write_config(folder, OmegaConf.to_yaml(earlier))


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
    if not isinstance(earlier, DictConfig) or not {"stage", "run"} <= earlier.keys():
        raise InputError(
            f"{file} is damaged or no config of a run; resume another run, or restore the file"
        )
    earlier.pop(STAMP, None)
    if earlier.stage != config.stage:
        if earlier.stage == "import" and "init" in config:
            raise InputError(
                f"resume={config.resume} is an imported tokenizer, which has no training to resume; train it further in a run "
                f"of its own: {format_word('init', config.resume)}"
            )
        raise InputError(
            f"resume={config.resume} is a run of stage={earlier.stage}; "
            f"say stage={earlier.stage} resume=..."
        )
    return earlier


def repeats_own_class(config: DictConfig, earlier: DictConfig, key: str) -> bool:
    """Whether a word such as data=mine or data._target_=mydata.Mine only chooses again, and so admits, the class of the user's
    own that the run has."""
    path = key.replace("/", ".").removesuffix("._target_")
    nodes = [OmegaConf.select(each, path) for each in (config, earlier)]
    if not all(isinstance(node, DictConfig) for node in nodes):  # a list has no part of this name
        return False
    targets = [node.get("_target_") for node in nodes]
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
    words = [f"stage={written.stage}", format_word("resume", whole)]
    if written.get("trust"):
        words.append(shlex.quote(format_trust(written.trust)))
    return f"resume with: {format_command(words)}"
