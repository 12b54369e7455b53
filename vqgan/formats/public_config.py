"""The config of another program beside its weights: read with care, and held against what the weights have."""

from collections.abc import Mapping, Sequence
from typing import Any

from codegrid.engine.errors import InputError
from vqgan.formats.base import PublicFile


def read_section(settings: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The settings under a name in a config, or under several, one in the other; none if there is no such section."""
    section: Any = settings
    for name in names:
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def check_config(file: PublicFile, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise InputError if a config has another value for any of these sizes, which the weights have: it is another model's."""
    differences = []
    for name, size in sizes.items():
        value = config.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = list(value)
        if value is not None and value != size:
            differences.append(f"{name}={value} where the weights have {size}")
    if differences:
        raise InputError(
            f"{file.source} and its config differ: the config says {', '.join(differences)}; "
            "name the config of these weights with config=<file>"
        )
