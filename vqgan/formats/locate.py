"""Which files of a folder are the weights, and which lie beside them."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from codegrid.engine.errors import InputError
from vqgan.formats.settings import CONFIG_ENDINGS

WEIGHT_ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
PIPELINE = "model_index.json"  # of diffusers
SUBFOLDERS = (
    "vqvae",
    "movq",
    "vqgan",
    "vae",
    "titok",
)  # of a pipeline or an export, where its tokenizer is
LOGS = ("checkpoints", "configs")  # of a training by taming's program
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # of weights in several files
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
# Files in which diffusers and transformers write the same weights again.
COPY = re.compile(
    r"(pytorch_)?(?P<stem>.+?)(\.(?P<variant>fp16|bf16|fp32|non_ema|ema))?\.(?P<ending>safetensors|bin)$"
)


class FileTree(Protocol):
    """Files by name, such as vqvae/config.json, here or on a hub.

    is_remote    whether files are downloaded
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def is_remote(self) -> bool: ...

    def fetch(self, name: str) -> Path:
        """The file on this machine."""

    def address(self, name: str) -> str:
        """How the user names it: from=..."""

    def cite(self, name: str) -> str:
        """Where it comes from, for a record."""


class LocalFolder:
    """A folder on this machine, with those of its subfolders that can hold a tokenizer."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        inner = [name for name in (*SUBFOLDERS, *LOGS) if (root / name).is_dir()]
        self.names = sorted(
            (PurePosixPath(folder) / entry.name).as_posix()
            for folder in ("", *inner)
            for entry in os.scandir(root / folder)
            if entry.is_file()
        )

    def fetch(self, name: str) -> Path:
        return self.root / name

    def address(self, name: str) -> str:
        return str(self.root / name)

    cite = address


def list_groups(folder: FileTree, inner: str = "") -> list[tuple[str, ...]]:
    """The sets of weights in a folder, each of one file or of several parts, where `inner` is a file or a folder in it.

    A pipeline's are those of its tokenizer, and a training's those in checkpoints/. Raises InputError if there are none.
    """
    if inner in folder.names:
        return [read_whole(folder, inner)]
    root = f"{inner}/" if inner else ""
    names = [name.removeprefix(root) for name in folder.names if name.startswith(root)]
    places = ["", *(f"{place}/" for place in (*SUBFOLDERS, LOGS[0]))]
    if PIPELINE in names:  # weights beside it are of other programs
        places = [*places[1:], ""]
    for place in places:
        here = [name for name in names if name.rpartition("/")[0] == place.rstrip("/")]
        groups = group_parts(folder, [root + name for name in here])
        if groups:
            return groups
    where = folder.address(inner).rstrip("/")
    raise InputError(f"{where} has no weights: no file that ends with {', '.join(WEIGHT_ENDINGS)}")


def read_whole(folder: FileTree, name: str) -> tuple[str, ...]:
    """The set of weights that a file is, is a part of, or is the index of."""
    if INDEX.search(name):
        return read_index(folder, name)
    if SHARD.search(name):
        beside = PurePosixPath(name).parent
        indices = [i for i in folder.names if INDEX.search(i) and PurePosixPath(i).parent == beside]
        for group in (read_index(folder, i) for i in indices):
            if name in group:
                return group
    return (name,)


def group_parts(folder: FileTree, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of weights among these names, one of each that is there in several forms."""
    sets = {name: read_index(folder, name) for name in names if INDEX.search(name)}
    parts = {part for group in sets.values() for part in group}
    sets |= {name: (name,) for name in names if name.endswith(WEIGHT_ENDINGS) and name not in parts}
    best: dict[str, tuple[tuple[bool, bool], tuple[str, ...]]] = {}
    for name, group in sets.items():
        copy = COPY.match(PurePosixPath(strip_index(name)).name)
        stem = copy["stem"] if copy else name
        rank = (bool(copy and copy["variant"]), bool(copy and copy["ending"] != "safetensors"))
        if stem not in best or rank < best[stem][0]:
            best[stem] = rank, group
    return sorted(group for _, group in best.values())


def strip_index(name: str) -> str:
    """The name of the file whose parts an index lists: model.safetensors of model.safetensors.index.fp16.json."""
    return INDEX.sub("", name)


def read_index(folder: FileTree, name: str) -> tuple[str, ...]:
    """The parts that an index lists, in the order of their names. Raises InputError for one that is no index or incomplete."""
    file = folder.fetch(name)
    try:
        parts = sorted({str(part) for part in json.loads(file.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder.address(name)} is no index of weights: it has no weight_map of names and files"
        ) from error
    paths = [(PurePosixPath(name).parent / part).as_posix() for part in parts]
    if missing := [part for part in paths if part not in folder.names]:
        raise InputError(
            f"{folder.address(name)} lists {len(missing)} parts that are not there, {missing[0]} for one; fetch them too"
        )
    return tuple(paths)


def list_configs(folder: FileTree, name: str) -> list[str]:
    """The configs that lie beside a file of weights."""
    place = PurePosixPath(name).parent.as_posix()
    places = {place, "configs", "."} if place == LOGS[0] else {place}
    return [
        other
        for other in folder.names
        if other.endswith(CONFIG_ENDINGS)
        and not INDEX.search(other)
        and PurePosixPath(other).name != PIPELINE
        and PurePosixPath(other).parent.as_posix() in places
    ]


def list_cards(folder: FileTree, name: str) -> list[str]:
    """The model cards of a file of weights, the nearest first."""
    places = [PurePosixPath(name).parent, *PurePosixPath(name).parent.parents]
    cards = [(place / "README.md").as_posix() for place in places]
    return [card for card in cards if card in folder.names]
