"""Which classes a config from a file may build, since users share run folders and checkpoints."""

import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from codegrid.engine.errors import InputError
from codegrid.engine.version import VERSION, Stamp, refuse_version

OURS = ("codegrid", "vqgan", "prior")  # the packages whose classes may be built

OTHERS = {  # names of other packages that the run folder of a training may contain
    "codegrid.engine.loggers.make_wandb_logger",
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


GROUPS = {  # what a later stage builds from a checkpoint, and its group in conf/
    "data": "data", "quantizer": "quantizer", "encoder": "model.encoder", "decoder": "model.decoder", "prior": "prior",
}  # fmt: skip


@dataclass(frozen=True)
class Trust:
    """What a command admits in files beside the classes of this project.

    names     full names of classes of the user's own, from `trust` and from the command itself
    choices   part -> the class that the command chooses for it again, as data=mine in a stage that takes its data from a
              checkpoint
    """

    names: frozenset[str] = frozenset()
    choices: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, config: DictConfig) -> "Trust":
        """The trust of a command: `trust`, the groups chosen again (`own`), and all that its own config names."""
        named = config.get("trust")
        names = named if isinstance(named, ListConfig) else [] if named is None else [named]
        for name in names:
            check_name(name)
        own = {part: OmegaConf.select(config, f"own.{key}") for part, key in GROUPS.items()}
        choices = {part: str(node._target_) for part, node in own.items() if node is not None}
        return cls(frozenset({*names, *foreign_targets(config)}), choices)

    def check_choice(self, part: str, target: Any) -> None:
        """Raise InputError if the command chooses another class for a part than the checkpoint has."""
        choice = self.choices.get(part)
        if choice not in (None, target):
            raise InputError(
                f"this command chooses {choice} for {GROUPS[part]}, and the checkpoint has {target}, which stays; "
                "leave the choice out, or repeat that of the checkpoint"
            )


def settle_trust(config: DictConfig, trust: Trust) -> DictConfig:
    """A copy of a command's config in which `trust` has all that the command admits, and `own` has been read."""
    settled = config.copy()
    OmegaConf.set_struct(settled, False)
    settled.pop("own", None)
    settled.trust = sorted(trust.names)
    OmegaConf.set_struct(settled, True)
    return settled


def describe_trust(config: Mapping[str, Any]) -> str | None:
    """What a user has to know of a run with classes of other packages; None for a run without any."""
    names = config.get("trust") or []
    if not names:
        return None
    are = "is" if len(names) == 1 else "are"
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return (
        f"{listed} {are} not part of Codegrid: to use this run in later stages, or to resume it, "
        f"add {format_trust(names)} to the command"
    )


def format_trust(names: Iterable[str]) -> str:
    """The word of a command that admits these names."""
    return f"trust=[{','.join(names)}]"


NOTHING = Trust()
_admitted: ContextVar[Trust] = ContextVar("admitted", default=NOTHING)


@contextmanager
def admit(trust: Trust) -> Iterator[None]:
    """Within this context files may name what `trust` has, as torch.serialization.safe_globals does for pickles."""
    token = _admitted.set(trust)
    try:
        yield
    finally:
        _admitted.reset(token)


def current_trust() -> Trust:
    """What the running command admits; outside of `admit` only this project's classes."""
    return _admitted.get()


def check_name(name: Any) -> None:
    """Raise InputError unless an entry of `trust` is the full name of a class that a user may have."""
    parts = str(name).split(".")
    if (
        not isinstance(name, str)
        or len(parts) < 2
        or not all(part.isidentifier() for part in parts)
    ):
        raise InputError(
            f"trust={name} must be the full name of a class, or a list of them, as in trust=[mydata.Mine]"
        )
    if parts[0] in sys.stdlib_module_names:
        raise InputError(
            f"trust={name} is part of Python itself, which no run folder needs; name classes of your own"
        )


def check_trusted(
    config: Any, source: str, also: Collection[str] = (), stamp: Stamp | None = None
) -> None:
    """Raise InputError if a config from `source` names more than classes that this project *defines* and those in `also`.

    Names that a module only imports don't count. No part of the config is resolved or run. `stamp` is the program that wrote
    the file: a class that this version lacks is the sentence of another version, not of mistrust.
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
            names = [name for name in foreign_targets(config) if name not in also]
            raise refuse_target(
                value, source, stamp, [name for name in names if is_foreign_class(name)]
            )
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"{source} says {where}={value}, which asks for something else on this machine; don't trust the file"
            )


def refuse_target(
    target: Any, source: str, stamp: Stamp | None, foreign: Sequence[str]
) -> InputError:
    """The error for a name in a file that may not be built: of another version, of a library or the user's own, or of no good.

    `foreign` are all classes of other packages that the file names, to be admitted together.
    """
    asks = f"{source} asks for {target}, which"
    if is_lacking(target):
        if stamp is not None and not stamp.is_current:
            return refuse_version(source, stamp, f"it has no {target}")
        return InputError(
            f"{asks} Codegrid {VERSION} does not have; if it is in a copy of the program that you changed, "
            "run that one, else don't trust the file"
        )
    if is_foreign_class(target):
        return InputError(
            f"{asks} is not part of Codegrid; if you chose it for this run yourself, add {format_trust(foreign)}, "
            "else don't trust the file"
        )
    return InputError(f"{asks} is not part of Codegrid; don't trust the file")


def is_foreign_class(target: Any) -> bool:
    """Whether the target looks like a class of a package other than this project's and Python's own."""
    package, *parts = str(target).split(".")
    return (
        package not in (*OURS, *sys.stdlib_module_names)
        and all(part.isidentifier() for part in (package, *parts))
        and bool(parts)
        and parts[-1][0].isupper()
    )


def is_lacking(target: Any) -> bool:
    """Whether the target is a name in one of this project's packages under which there is nothing."""
    module, _, name = str(target).rpartition(".")
    if module.split(".")[0] not in OURS or not all(map(str.isidentifier, str(target).split("."))):
        return False
    try:
        return name not in vars(import_module(module))
    except ImportError as error:  # of the module itself, or of a library that it needs
        return error.name is not None and f"{module}.".startswith(f"{error.name}.")


def foreign_targets(config: Any) -> list[str]:
    """The classes and functions that a config names and that are neither this project's nor of the libraries it builds on."""
    targets = {str(v) for key, v in flatten_config(config) if key.split(".")[-1] == "_target_"}
    return sorted(name for name in targets - OTHERS if not is_ours(name))


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
