"""Which classes a config from a file may build, since users share run folders and checkpoints."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from engine.errors import InputError

OURS = ("engine", "data", "evaluation", "vqgan", "prior")  # the packages whose classes may be built

OTHERS = {  # names of other packages that the run folder of a training may contain
    "engine.loggers.make_wandb_logger",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    *(
        f"torch.optim.{name}"
        for name in ("Adam", "AdamW", "Adagrad", "Muon", "NAdam", "RAdam", "RMSprop", "SGD")
    ),
}

# The accepted keys of Hydra. Its other keys would change what is called, and how.
KEYS = {"_target_", "_partial_", "_convert_"}


def check_trusted(config: Any, source: str, also: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Raise InputError if a config from `source` names more than classes that this project *defines* and those in `also`.

    Names that a module only imports don't count. No part of the config is resolved or run.
    """
    for where, value in flatten_config(config):
        *_, key = words = where.split(".")
        if [
            word
            for word in words
            if word.startswith("_") and word.endswith("_") and word not in KEYS
        ]:
            raise InputError(
                f"{source} says {where}, which no run of Codegrid writes; don't trust the file"
            )
        if key == "_target_" and value not in also and not is_ours(value):
            raise InputError(
                f"{source} asks for {value}, which is not part of Codegrid; don't trust the file"
            )
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"{source} says {where}={value}, which asks for something else on this machine; don't trust the file"
            )


def flatten_config(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The full key and the unresolved value of every leaf of a config."""
    if isinstance(config, DictConfig | ListConfig):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            where = f"{prefix}.{key}" if prefix else str(key)
            yield from (
                flatten_config(value, where)
                if isinstance(value, dict | list | DictConfig | ListConfig)
                else [(where, value)]
            )


def is_ours(target: Any) -> bool:
    """Whether the target names a class by its defining module, in one of this project's packages."""
    module, _, name = str(target).rpartition(".")
    if module.split(".")[0] not in OURS or not all(
        part.isidentifier() for part in str(target).split(".")
    ):
        return False
    try:
        target_class = vars(import_module(module)).get(name)
    except ImportError:
        return False
    return inspect.isclass(target_class) and target_class.__module__ == module
