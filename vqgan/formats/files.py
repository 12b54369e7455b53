"""Public weights on disk or on a hub: one file, folder or id becomes the tensors and settings of one tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from codegrid.engine.errors import InputError, summarize_error
from vqgan.formats.base import PublicFile
from vqgan.formats.hub import HUB_ID, HubFolder
from vqgan.formats.locate import (
    LOGS,
    SUBFOLDERS,
    WEIGHT_ENDINGS,
    FileTree,
    LocalFolder,
    list_cards,
    list_configs,
    list_groups,
)
from vqgan.formats.parts import choose_average, split_content
from vqgan.formats.pickles import find_broken_part, read_pickle
from vqgan.formats.settings import choose_config
from vqgan.formats.weights import DiskTensors, SafeStored

BLOCK_SIZE = 1 << 20  # bytes that are hashed at a time
UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class Contents:
    """What a public source holds.

    file       its tokenizer; tensors[name] reads from the disk at each access, so a weight is asked for when it is copied, and
               none is collected. Half precision comes as float32
    ignored    what else is in it, and how many tensors each has: {"discriminator": 16, "optimizer": 930}
    sha256     of the file; of several parts one after the other, in the order of their names, as cat and sha256sum have it
    origin     the file's absolute path, or hub:owner/name/file@commit
    licence    as the file or the model card beside it says, or "unknown"
    remarks    what was chosen where there was a choice, one sentence each
    """

    file: PublicFile
    ignored: Mapping[str, int]
    sha256: str
    origin: str
    licence: str
    remarks: tuple[str, ...] = ()


def open_public(source: str, config: str | None, ema: bool | None) -> Contents:
    """The tokenizer in a file, a folder or a hub id (owner/name, owner/name/file); reading it runs no code.

    `config` is its own config file, None for the one beside it, if there is one. `ema` takes averaged weights (True), the last
    ones (False), or averaged ones if there are some (None). Raises InputError, with one sentence, for whatever can't be read.
    """
    if ema not in (None, True, False):
        raise InputError(f"ema={ema} must be true, false or null")
    folder, inner = open_folder(str(source))  # as a command gives it, it can look like a number
    group = choose_group(folder, list_groups(folder, inner))
    files = [folder.fetch(name) for name in group]
    content, licence = read_files(files)
    parts = split_content(content, files[0])
    weights, average = choose_average(parts, ema, files[0])
    names = list_configs(folder, group[0]) if config is None else []
    beside = [folder.fetch(name) for name in names]
    description, mismatch = choose_config(weights, beside, content, config, str(files[0]))
    file = PublicFile(
        source=str(files[0]),
        tensors=DiskTensors(weights),
        settings=description.settings if description else {},
        target=description.target if description else None,
        averaged=frozenset(parts.averaged),
    )
    cards = [folder.fetch(name) for name in list_cards(folder, group[0])]
    return Contents(
        file=file,
        ignored=dict(parts.others),
        sha256=hash_files(files),
        origin=folder.cite(group[0]),
        licence=licence or read_licence(cards),
        remarks=tuple(remark for remark in (average, mismatch) if remark),
    )


def open_folder(source: str) -> tuple[FileTree, str]:
    """The folder that a source is or lies in, and its name there ("" for the folder itself).

    Raises InputError if there is no such file or folder, and none on the hub.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return LocalFolder(path.absolute()), ""
    if path.is_file():
        path = path.absolute()  # the caches of hubs are links to files without names
        root = path.parent.parent if path.parent.name in (*SUBFOLDERS, *LOGS) else path.parent
        return LocalFolder(root), path.relative_to(root).as_posix()
    match = HUB_ID.match(source)
    if not match or (source.endswith(WEIGHT_ENDINGS) and not match["inner"]):
        raise InputError(
            f"from={source} does not exist; give a file, a folder, or a hub id such as owner/name"
        )
    return HubFolder(match["repository"]), (match["inner"] or "").rstrip("/")


def choose_group(folder: FileTree, groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The one set of weights with a tokenizer. Raises InputError if several have one, or none."""
    if len(groups) > 1 and not folder.is_remote:
        complaints = {group: find_complaint(folder, group) for group in groups}
        holding = [group for group in groups if complaints[group] is None]
        if not holding:
            raise InputError(complaints[groups[0]])
        groups = holding
    if len(groups) > 1:
        names = ", ".join(folder.address(group[0]) for group in groups[:10])
        more = f" and {len(groups) - 10} more" if len(groups) > 10 else ""
        raise InputError(
            f"{len(groups)} files could be the weights; give one of them as from=: {names}{more}"
        )
    return groups[0]


def find_complaint(folder: FileTree, group: Sequence[str]) -> str | None:
    """Why a set of weights, one of several, is no tokenizer's; None if it can be read and has an encoder and a decoder."""
    files = [folder.fetch(name) for name in group]
    try:
        content, _ = read_files(files)
        is_autoencoder = split_content(content, files[0]).is_autoencoder
    except InputError as error:
        return str(error)
    return None if is_autoencoder else f"{files[0]} has no encoder and decoder of a tokenizer"


def read_files(files: Sequence[Path]) -> tuple[Any, str | None]:
    """The content of a file, or all tensors of its parts, with the tensors left on the disk; and its licence, if it has one.

    Raises InputError for a file that is damaged, and for one of this program.
    """
    contents = []
    licence = None
    for file in files:
        try:
            is_safe = is_safetensors(file)
        except OSError as error:
            raise InputError(f"{file} can't be read ({summarize_error(error)})") from error
        if is_safe:
            content, metadata = read_safetensors(file)
            licence = licence or metadata.get("license") or metadata.get("modelspec.license")
        else:
            content = read_pickle(file)
        if isinstance(content, Mapping) and "codegrid" in content:
            raise InputError(
                f"{file} is a checkpoint of Codegrid already; every stage takes it as ckpt=<its run folder>"
            )
        contents.append(content)
    if len(contents) == 1:
        return contents[0], licence
    merged: dict[Any, Any] = {}
    for content in contents:
        merged |= content if isinstance(content, Mapping) else {}
    return merged, licence


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as safetensors does, with the length of a JSON text and that text."""
    with file.open("rb") as opened:
        start = opened.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and 8 + length <= file.stat().st_size


def read_safetensors(file: Path) -> tuple[dict[str, SafeStored], Mapping[str, str]]:
    """The tensors of a safetensors file, left on the disk, and what it says of itself. Raises InputError if it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            tensors = {
                name: SafeStored(file, name, tuple(opened.get_slice(name).get_shape()))
                for name in names
            }
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({summarize_error(error)}); fetch it again") from error


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes one after another. Raises InputError for a file whose own checksums are wrong."""
    digest = hashlib.sha256()
    for file in files:
        if part := find_broken_part(file):
            raise InputError(f"{file} is damaged: the checksum of {part} is wrong; fetch it again")
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_SIZE):
                digest.update(block)
    return digest.hexdigest()


def read_licence(cards: Sequence[Path]) -> str:
    """The licence that the first lines of a model card name, "unknown" without one."""
    for card in cards:
        _, separator, text = card.read_text(errors="replace").partition("---\n")
        try:
            described = yaml.safe_load(text.partition("\n---")[0]) if separator else None
        except yaml.YAMLError:  # somebody's own notes
            continue
        if not isinstance(described, Mapping):
            continue
        licence = described.get("license")
        if licence == "other":
            licence = described.get("license_name") or licence
        if licence:
            return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
    return UNKNOWN_LICENCE
