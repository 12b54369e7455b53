"""How an object gets into a file and back, strictly and safely."""

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from engine.aliases import upgrade_config
from engine.console import log_line
from engine.errors import InputError
from engine.trust import check_trusted

Built = TypeVar("Built")

FORMAT = 1  # raise it when an older program could not read the file

AVERAGE = "average"  # the key of the averaged weights

LAST = Path("checkpoints") / "last.ckpt"  # to go on with

PREVIOUS = Path("checkpoints") / "previous.ckpt"  # the one before, for when the last is damaged

BEST = Path("checkpoints") / "best.ckpt"  # to be used, where a run looks for it


def checkpoint_files(ckpt: str | Path) -> list[Path]:
    """The checkpoint files of a run folder that there are, the best before the last and its predecessor, or the file itself."""
    path = Path(ckpt).expanduser()
    wanted = [path / BEST, path / LAST, path / PREVIOUS] if path.is_dir() else [path]
    found = [file for file in wanted if file.is_file()]
    if not found:
        file = path / LAST if path.is_dir() else path
        raise InputError(
            f"ckpt={ckpt} has no checkpoint ({file} is missing); give a run folder such as runs/vqgan/shapes, or a file"
        )
    return found


def find_checkpoint(ckpt: str | Path) -> Path:
    """The checkpoint file of a run folder, the best where it is kept, or the file itself."""
    return checkpoint_files(ckpt)[0]


def find_damage(file: Path) -> str | None:
    """What is wrong with a file that torch.save has written: it is a zip with a checksum of each part, at which torch.load
    does not look."""
    try:
        with zipfile.ZipFile(file) as parts:
            wrong = parts.testzip()
        return wrong and f"the checksum of {wrong} is wrong"
    except Exception as error:  # damage can make a reader stumble over anything
        return f"{type(error).__name__}: {error}"


def read_checkpoint(ckpt: str | Path, *stages: str) -> dict[str, Any]:
    """A checkpoint of one of these stages as plain containers and tensors on the CPU; reading it runs no code of the file.

    Of a run folder the next file is taken where one is damaged, which is said."""
    wanted = " or ".join(f"stage={stage}" for stage in stages)
    files = checkpoint_files(ckpt)
    sound = next((file for file in files if find_damage(file) is None), None)
    if sound is None:
        raise InputError(
            f"{files[0]} is damaged or no checkpoint of Codegrid; give a run folder of {wanted}"
        )
    if sound != files[0]:
        log_line(f"{files[0]} is damaged ({find_damage(files[0])}): {sound} is used in its place")
    try:
        checkpoint: dict[str, Any] = torch.load(sound, map_location="cpu", weights_only=True)
        header = checkpoint["codegrid"]
        header["config"] = upgrade_config(header["config"])
    except Exception as error:  # of what can be in a file that is not ours, no list is complete
        raise InputError(
            f"{sound} is damaged or no checkpoint of Codegrid; give a run folder of {wanted}"
        ) from error
    if header["format"] > FORMAT:
        raise InputError(
            f"{sound} has format {header['format']}, this program reads up to {FORMAT}; update Codegrid"
        )
    if header["stage"] not in stages:
        raise InputError(
            f"{sound} comes from stage={header['stage']}, and a checkpoint of {wanted} is needed"
        )
    return checkpoint


def find_resumable(folder: Path) -> Path:
    """The checkpoint that a run goes on from: the last, or the one before where it is missing or damaged.

    A damaged one is set aside as damaged.ckpt, or the next save would take it for a good one and put it in the place of its
    predecessor."""
    last, previous = folder / LAST, folder / PREVIOUS
    wrong = find_damage(last) if last.is_file() else "it is missing"
    if wrong is None:
        return last
    if not previous.is_file() or find_damage(previous):
        if not last.is_file() and not previous.is_file():
            raise InputError(
                f"{folder} has no checkpoint to go on from, for it ended before its first; start the run again "
                "with the command in its card.md"
            )
        raise InputError(
            f"{last} is damaged ({wrong}), and {previous} can't take its place; start the run again"
        )
    log_line(f"{last} can't be used ({wrong}): the run goes on from {previous}")
    with suppress(FileNotFoundError):  # missing, or another process of this run was first
        os.replace(last, last.with_name("damaged.ckpt"))
    return previous


def make_header(stage: str, config: DictConfig) -> dict[str, Any]:
    """What makes a checkpoint speak for itself: its format, its stage and the resolved config as a plain dict."""
    return {
        "format": FORMAT,
        "stage": stage,
        "config": OmegaConf.to_container(config, resolve=True),
    }


def build_trusted(config: Any, kind: type[Built]) -> Built:
    """Instantiate a config that came from a checkpoint, a plain dict: this project's own classes and nothing else; what comes
    of it must be of this kind."""
    if isinstance(config, DictConfig):  # of the command itself, where a value may stand for another
        config = OmegaConf.to_container(config, resolve=True)
    check_trusted(config, "the checkpoint")
    made = instantiate(config)
    if not isinstance(made, kind):
        raise InputError(
            f"the checkpoint has {config['_target_']} for a {kind.__name__.lower()}; don't trust the file"
        )
    return made


def substate(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of a state dict under `name.`, without that prefix."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }


def save_atomically(content: Any, file: Path, previous: Path | None = None) -> None:
    """torch.save that leaves either the complete new file or the old one, on the disk for good; the old one may be kept.

    With `previous`, between two renames there is no `file` for a moment, but `previous` is whole."""
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
        if isinstance(error, RuntimeError) and isinstance(
            error.__context__, OSError
        ):  # torch's writer stumbles on over a full disk
            raise error.__context__ from None
        raise
    if previous is not None and file.exists():
        os.replace(file, previous)
    os.replace(temporary, file)
    with suppress(OSError):  # some file systems of clusters don't sync folders
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the names may be lost with the power
        finally:
            os.close(folder)
