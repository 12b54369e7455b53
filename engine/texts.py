"""The settings whose value is text, whatever it looks like: names, labels of a logger, files and folders."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from codegrid.engine.errors import InputError

# Last parts of keys. Settings that choose among a few words (data.crop, lpips) need no entry: a number is none of them.
PATHS = (
    "cache_dir",
    "ckpt",
    "codes",
    "compare_to",
    "config",
    "decoder",
    "features",
    "features_dir",
    "files",
    "from",
    "init",
    "reference",
    "resume",
    "run_dir",
    "runs",
    "samples",
    "data.files",
    "data.labels",
    "data.path",
    "data.root",
    "data.train",
    "data.val",
    "data.val_labels",
    "data.val_root",
    "sampler.init_image",
    "hydra.sweep.dir",
)
TEXTS = (
    *PATHS,
    "hub",
    "id",
    "licence",
    "name",
    "objective",
    "sweep",
    "data.attribute",
    "data.classes",
    "data.columns",
    "data.column_names",
    "data.file_column",
    "data.image",
    "data.label",
    "revision",
    "wandb.group",
    "wandb.project",
    "wandb.tags",
    "hydra.sweeper.storage",
    "hydra.sweeper.study_name",
)
# Elsewhere they may be settings of other meaning: of quantizers, and of classes of the user's own.
TOP_LEVEL = ("from", "init", "codes", "decoder", "files")
LISTS = (
    "files",
    "runs",
    "data.classes",
    "data.columns",
    "data.files",
    "wandb.tags",
)  # several texts, or one
OR_NUMBERS = ("samples",)  # a file, or how many
# What exists already, or nothing: `false` has always meant null here.
OPTIONAL = (
    "ckpt",
    "codes",
    "compare_to",
    "config",
    "decoder",
    "features",
    "from",
    "init",
    "reference",
    "resume",
    "data.labels",
    "data.val_labels",
    "data.val_root",
    "sampler.init_image",
)


def is_text(key: str) -> bool:
    """Whether the setting of this dotted key is text, at any depth, as in evaluate.compare_to."""
    return ends_with(key, TEXTS)


def is_path(key: str) -> bool:
    """Whether the setting of this dotted key is a file or a folder, or several."""
    return ends_with(key, PATHS)


def is_optional(key: str) -> bool:
    """Whether false means null in the setting of this dotted key."""
    return ends_with(key, OPTIONAL)


def may_be_number(key: str) -> bool:
    """Whether the setting of this dotted key is a path or a number."""
    return ends_with(key, OR_NUMBERS)


def ends_with(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of `names`, or ends with one that may be at any depth."""
    endings = tuple(f".{name}" for name in names if name not in TOP_LEVEL)
    return key in names or key.endswith(endings)


def read_text(key: str, value: Any) -> Any:
    """The value of a setting that is text: a string, null, or a list or mapping of such values; `~` is expanded in paths."""
    if isinstance(value, Mapping):
        return {name: read_text(key, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [read_text(key, each) for each in value]
    if value is None or (value is False and is_optional(key)):
        return None
    if isinstance(value, int | float) and may_be_number(key):
        return value
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return expand_home(text) if is_path(key) else text


def read_texts(node: Any, path: str = "") -> Any:
    """Plain containers of a config in which settings that are text are so."""
    if path and is_text(path):
        return read_text(path, node)
    if isinstance(node, Mapping):
        return {
            name: read_texts(value, f"{path}.{name}" if path else str(name))
            for name, value in node.items()
        }
    return node


def expand_home(path: str) -> str:
    """Replace a leading `~` or `~user` by the home folder. A file whose name begins with `~` gets its whole path."""
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if str(Path(expanded)).startswith("~") else expanded


def normalise_texts(config: DictConfig) -> None:
    """Make the settings that are text so, in place: YAML and Hydra read name=7 as a number.

    References stay, apart from those to a number or to a path with `~`, as in name=${seed}.
    Raises InputError for a list where one text belongs. A dataset class of the user's own may take lists.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in list_texts(plain):
        is_one = not ends_with(key, LISTS) and "data." not in key
        if is_one and isinstance(value, Mapping | list):
            raise InputError(
                f"{key}={value} is a list or a mapping, and {key} takes one text; "
                f"a name with brackets needs quotes inside the word, as in '{key}=\"[1] photos\"'"
            )
        if isinstance(value, str) and "${" in value:
            resolved = OmegaConf.select(config, key, throw_on_resolution_failure=False)
            value = resolved if isinstance(resolved, int | float | str) else value
            if read_text(key, value) == value:
                continue
        if (text := read_text(key, value)) != value:
            OmegaConf.update(config, key, text, merge=False)


def list_texts(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of the settings below a mapping that are text."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if is_text(key):
            yield key, value
        elif isinstance(value, Mapping):
            yield from list_texts(value, f"{key}.")
