"""Where things are and on what a run works, as opposed to what it is: these settings may change whenever a run goes on.

A class declares those of its own settings in `place_settings`, a tuple of names; the others are here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from codegrid.engine.errors import InputError, explain_import, find_mistake

CONF_PLACES = Path(__file__).parents[1] / "conf" / "places" / "default.yaml"
STAGE_PLACES = ("cache_dir", "accelerator", "devices", "num_nodes", "compare_to")  # of any stage
TRAINER_PLACES = ("accelerator", "devices", "num_nodes", "strategy")
KEY_OF_DATA = re.compile(
    r"\+*(\w+\.)*(condition_)?data\.[\w.]+="
)  # data.root=..., evaluate.data.root=...
DATA_PLACES = (
    "data",
    "condition_data",
)  # groups of a later stage that replace settings of a tokenizer's data
KEY_OF_QUANTIZER = re.compile(r"\+*quantizer\.[\w.]+=")
LOADED_BY = ("ckpt", "resume")  # a command with one of these takes its data from a run
STARTED_BY = ("init",)  # and with this one its quantizer


def data_places() -> list[str]:
    """The names of the places of all datasets."""
    return list(map(str, OmegaConf.load(CONF_PLACES)))


def declared_places(target: str) -> tuple[str, ...]:
    """The settings of a class, given by its name as in `_target_`, that are places: its own and those of its bases."""
    try:
        kind = resolve_name(target)
    except ImportError as error:
        raise InputError(explain_import(target)) from error
    except (AttributeError, ValueError):
        return ()  # whoever builds it says what is wrong
    bases = getattr(kind, "__mro__", ())
    names = (name for base in bases for name in vars(base).get("place_settings", ()))
    return tuple(dict.fromkeys(names))


def places_of(settings: Mapping[Any, Any]) -> tuple[str, ...]:
    """The settings of an object's config that are places: those that its class declares, and a `root` in any case."""
    declared = declared_places(settings["_target_"])
    return declared if "root" in declared or "root" not in settings else ("root", *declared)


def is_place(config: DictConfig, key: str) -> bool:
    """Whether a full key of a config, or a part of the config that holds it, says where things are instead of what a run is."""
    words = key.split(".")
    return any(_is_place(config, words[:end]) for end in range(1, len(words) + 1))


def _is_place(config: DictConfig, words: Sequence[str]) -> bool:
    *parents, name = words
    if name == "logger":
        return True
    parent: Any = OmegaConf.select(config, ".".join(parents)) if parents else config
    if not isinstance(parent, DictConfig):
        return False
    if "_target_" in parent:
        return name in places_of(parent)
    if parents and parents[-1] == "trainer":
        return name in TRAINER_PLACES
    if parents and parents[-1] in DATA_PLACES:
        return True
    return "run" in parent and name in STAGE_PLACES


def list_places(config: DictConfig) -> Iterator[str]:
    """The keys of a run's config that say where things are, other than those of the trainer and the loggers.

    Those of the later stages of a pipeline follow the first, so they are left out.
    """
    for name in map(str, config):
        if name != "logger" and is_place(config, name):
            yield name
    data = config.get("data")
    if isinstance(data, DictConfig):
        own = places_of(data) if "_target_" in data else tuple(map(str, data))
        yield from (f"data.{name}" for name in own)


@contextmanager
def limit_advice(places: Sequence[str]) -> Iterator[None]:
    """Inside, an InputError that names a setting of data which can't change gets the `places` that can, by their keys."""
    try:
        yield
    except (InputError, InstantiationException) as error:
        if limited := explain_advice(error, places):
            raise limited from error
        raise


def explain_advice(error: BaseException, places: Sequence[str]) -> InputError | None:
    """The sentence of an InputError that names another setting of data than `places`, with what can change instead.

    None for other errors and other sentences.
    """
    mistake = find_mistake(error)
    names = set(re.findall(r"\bdata\.\w+(?==)", str(mistake)))
    if mistake is None or names <= set(places):
        return None
    return InputError(
        f"{mistake}; but this command takes its images from a run, and can only say where they are: {', '.join(places)}"
    )


def admit_places(words: Sequence[str]) -> list[str]:
    """A command's words, with which Hydra takes settings of data that it does not know yet, since a run has them.

    A run that `ckpt` or `resume` names may have another dataset than the one that is composed by default, and the one that
    `init` names another quantizer; the stage checks these settings. A sweep's words stay, because its folders are named after
    them.
    """
    if {"-m", "--multirun"} & set(words):
        return list(words)
    keys = {word.lstrip("+").split("=")[0] for word in words}
    admitted = [
        pattern
        for pattern, names in ((KEY_OF_DATA, LOADED_BY), (KEY_OF_QUANTIZER, STARTED_BY))
        if keys & set(names)
    ]
    return [
        f"++{word.lstrip('+')}" if any(pattern.match(word) for pattern in admitted) else word
        for word in words
    ]
