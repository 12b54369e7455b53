"""Checkpoint files: written whole or not at all, checked, read strictly and without running code."""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from codegrid.engine.aliases import upgrade_config
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.folder import BEST, CARD, DAMAGED, LAST, PREVIOUS, read_record
from codegrid.engine.foreign import refuse_foreign
from codegrid.engine.trust import check_trusted, current_trust
from codegrid.engine.version import (
    FORMAT,
    VERSION,
    Stamp,
    check_format,
    name_version,
    refuse_version,
)

Built = TypeVar("Built")

EXTRA_STATE = "_extra_state"  # torch's name of what a module stores in a form of its own
AVERAGE = "average"  # the key of the averaged weights
RESTORED = ("state_dict", "optimizer_states", "callbacks", "clock", "random")  # needed to resume


def checkpoint_files(ckpt: str | Path, setting: str = "ckpt") -> list[Path]:
    """The checkpoints in a run folder, best first, then the last and its predecessor; or the file itself.

    Raises InputError if there are none; `setting` is the one that names the folder.
    """
    path = Path(ckpt).expanduser()
    candidates = [path / BEST, path / LAST, path / PREVIOUS] if path.is_dir() else [path]
    files = [file for file in candidates if file.is_file()]
    if not files:
        missing = path / LAST if path.is_dir() else path
        raise InputError(
            f"{setting}={ckpt} has no checkpoint ({missing} is missing); "
            "give a run folder such as runs/vqgan/shapes, or a file"
        )
    return files


def find_checkpoint(ckpt: str | Path) -> Path:
    """The checkpoint to use from a run folder, the best if it has one; or the file itself."""
    return checkpoint_files(ckpt)[0]


def find_damage(file: Path) -> str | None:
    """What is wrong with a file that torch.save wrote; None if it is sound.

    The file is a zip with a checksum of each part, which torch.load does not compare.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
        return damaged and f"the checksum of {damaged} is wrong"
    except Exception as error:  # a damaged file can raise anything
        return f"{type(error).__name__}: {error}"


def read_checkpoint(ckpt: str | Path, *stages: str, setting: str = "ckpt") -> dict[str, Any]:
    """A checkpoint of one of these stages as plain containers and tensors on the CPU; reading it runs no code.

    Falls back to the next checkpoint of a run folder if one is damaged, and reports it. A file that is damaged, one that asks
    for code to be run, and one of another version each have a sentence of their own.
    """
    refuse_foreign(ckpt)
    wanted = " or ".join(f"stage={stage}" for stage in stages)
    files = checkpoint_files(ckpt, setting)
    sound = next((file for file in files if find_damage(file) is None), None)
    if sound is None:
        raise InputError(
            f"{files[0]} is damaged or no checkpoint of Codegrid ({find_damage(files[0])}); "
            f"give a run folder of {wanted}"
        )
    if sound != files[0]:
        log_line(f"{files[0]} is damaged ({find_damage(files[0])}): {sound} is used instead")
    checkpoint = load_plain(sound)
    header = check_header(checkpoint, sound, f"give a run folder of {wanted}")
    if header["stage"] not in stages:
        raise InputError(
            f"{sound} comes from stage={header['stage']}, and a checkpoint of {wanted} is needed"
        )
    return checkpoint


def load_plain(file: Path, mmap: bool = False) -> Any:
    """The content of a sound file, plain containers and tensors on the CPU; InputError for any other.

    With `mmap` the tensors are read from the disk when they are used.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:  # its checksums are right, so this is what was written
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = asked[1] if asked else "objects other than tensors and plain containers"
        raise InputError(
            f"{file} asks for {what}, which reading a checkpoint of Codegrid never needs; don't trust the file"
        ) from error
    except Exception as error:  # a zip of another kind can raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is no checkpoint of Codegrid ({reason})") from error


def check_header(checkpoint: Any, file: Path, advice: str) -> dict[str, Any]:
    """The header of a checkpoint, with its config upgraded to the names of today.

    Raises InputError for a file of another program, and for one of a version that this program can't read.
    """
    header = checkpoint.get("codegrid") if isinstance(checkpoint, dict) else None
    if not isinstance(header, dict):
        raise InputError(f"{file} is no checkpoint of Codegrid: it has no header; {advice}")
    stamp = Stamp.read(header)
    check_format(file, stamp)  # first: what else a newer header holds is unknown
    if missing := [name for name in ("stage", "config") if name not in header]:
        raise refuse_version(file, stamp, f"its header lacks {' and '.join(missing)}")
    header["config"] = upgrade_config(header["config"], Stamp.read(header))
    return header


def find_resumable(folder: Path) -> Path:
    """The checkpoint that a run resumes from: the last, or the one before if that is missing or damaged.

    A damaged one is set aside as damaged.ckpt, or the next save would keep it as the good predecessor.
    """
    last = folder / LAST
    previous = folder / PREVIOUS
    damage = find_damage(last) if last.is_file() else "it is missing"
    if damage is None:
        return last
    if not previous.is_file() or find_damage(previous):
        if not last.is_file() and not previous.is_file():
            raise InputError(
                f"{folder} has no checkpoint to resume from, for it ended before its first; "
                f"start the run again with the command in its {CARD}"
            )
        raise InputError(
            f"{last} is damaged ({damage}), and {previous} can't take its place; start the run again"
        )
    log_line(f"{last} can't be used ({damage}): the run resumes from {previous}")
    with suppress(FileNotFoundError):  # missing, or another process of this run was first
        os.replace(last, folder / DAMAGED)
    return previous


def check_restorable(folder: Path, stage: str, expected: Mapping[str, Any]) -> None:
    """Raise InputError unless a run can resume from its folder: with a checkpoint of this stage whose weights are those of
    the module, whose state dict is `expected`."""
    file = find_resumable(folder)
    checkpoint = load_plain(file, mmap=True)
    header = check_header(checkpoint, file, "resume another run")
    stamp = Stamp.read(header)
    if header["stage"] != stage:
        raise InputError(f"{file} comes from stage={header['stage']}, and {folder} is of {stage}")
    if missing := [name for name in RESTORED if name not in checkpoint]:
        lacks = f"it lacks {' and '.join(missing)}"
        if stamp.is_current:
            raise InputError(f"{file} is damaged: {lacks}; resume another run")
        raise refuse_version(file, stamp, lacks)
    check_weights(checkpoint["state_dict"], expected, file, stamp)


def make_header(stage: str, config: Any) -> dict[str, Any]:
    """What makes a checkpoint speak for itself: format, version, stage, and the resolved config as a plain dict."""
    return {"format": FORMAT, "version": VERSION, "stage": stage, "config": config}


def build_trusted(
    config: Any,
    kind: type[Built],
    source: str | Path = "the checkpoint",
    stamp: Stamp | None = None,
) -> Built:
    """Instantiate a config that may come from a checkpoint: only this project's own classes, and those that are admitted.

    `source` and `stamp` are the file and the program that wrote it, None if that is unknown. Raises InputError if the config
    asks for anything else, makes something that is not a `kind`, or has the settings of another version.
    """
    if OmegaConf.is_config(config):  # the command's own, which may refer to other values
        config = OmegaConf.to_container(config, resolve=True)
    check_trusted(config, str(source), current_trust().names, stamp)
    with name_version(source, stamp):
        built = instantiate(config)
    if not isinstance(built, kind):
        raise InputError(
            f"{source} has {config['_target_']}, which is not derived from {kind.__module__}.{kind.__name__}; derive your own "
            "class from it, or don't trust the file"
        )
    return built


def check_weights(
    weights: Mapping[str, Any], expected: Mapping[str, Any], source: str | Path, stamp: Stamp
) -> None:
    """Raise InputError unless the weights in a file have the names and shapes of those of the model that its config builds."""
    differences = [
        *describe_names("Missing keys", expected.keys() - weights.keys()),
        *describe_names("unknown keys", weights.keys() - expected.keys()),
        *describe_names(
            "other shapes",
            (
                f"{name} {list(weights[name].shape)} instead of {list(expected[name].shape)}"
                for name in expected.keys() & weights.keys()
                if not name.endswith(EXTRA_STATE) and weights[name].shape != expected[name].shape
            ),
        ),
    ]
    if not differences:
        return
    details = "; ".join(differences)
    if stamp.is_current:
        raise InputError(
            f"{source} is damaged: its weights are not those of its config ({details})"
        )
    raise refuse_version(source, stamp, f"its weights are those of another model ({details})")


def describe_names(what: str, names: Iterable[str]) -> list[str]:
    """A few of these names in one text, none if there are none."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return [f"{what}: {', '.join(listed[:3])}{more}"] if listed else []


def build_data(config: Any) -> Any:
    """The dataset of a command's own config."""
    return instantiate(config)


def read_run_id(ckpt: str | Path) -> str | None:
    """The id of the run whose checkpoint `ckpt` names, without reading its weights; None if there is none or it has none."""
    try:
        file = find_checkpoint(ckpt)
        header = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["codegrid"]
    except Exception:  # what is wrong with the file is said by whoever reads all of it
        return None
    run_id: str | None = header["config"].get("id")
    return run_id


def names_same_run(ckpt: str | None, folder: Path) -> bool:
    """Whether `ckpt` names the run on which the run in `folder` stands by its record, wherever it was then."""
    recorded = read_record(folder, "of")
    return bool(ckpt and recorded) and read_run_id(str(ckpt)) == recorded


def substate(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of a state dict under `name.`, without that prefix."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def save_atomically(content: Any, file: Path, previous: Path | None = None) -> None:
    """torch.save that leaves either the complete new file or the old one, flushed to the disk.

    With `previous` the old file is kept under that name. Between the two renames there is no `file` for a moment, but
    `previous` is complete.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as opened:
            torch.save(content, opened)
            opened.flush()
            os.fsync(opened.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()  # it may be what fills the disk
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer hides the full disk
        raise
    if previous is not None and file.exists():
        os.replace(file, previous)
    os.replace(temporary, file)
    with suppress(OSError):  # some cluster file systems can't sync folders
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure may lose the names
        finally:
            os.close(folder)
