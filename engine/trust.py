"""What a config that came from a file may build: run folders and checkpoints are passed on from hand to hand."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from engine.errors import InputError

OURS = ("engine", "data", "evaluation", "vqgan", "prior")  # the packages whose classes may be built

OTHERS = {  # what else the run folder of a training may name
    "engine.loggers.make_wandb_logger",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    *(
        f"torch.optim.{name}"
        for name in ("Adam", "AdamW", "Adagrad", "Muon", "NAdam", "RAdam", "RMSprop", "SGD")
    ),
}

KEYS = {
    "_target_",
    "_partial_",
    "_convert_",
}  # of Hydra's own; others would change what is called, and how


def check_trusted(config: Any, source: str, also: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Raise InputError where a config from `source` asks for more than classes *defined in* this project's packages, and
    what is in `also`: what a module has imported is none of its own. Nothing of the config is resolved or run."""
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
    """All keys of a config that hold no others, each whole, with their values as they are written, not resolved."""
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
    """Whether this names a class by the module that defines it, in one of this project's packages."""
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
