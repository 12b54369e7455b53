"""The settings of a quantizer that no public file has: those of conf/quantizer."""

from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf


def read_quantizer(option: str, **settings: Any) -> dict[str, Any]:
    """The `quantizer` group of conf/quantizer/<option>.yaml with these settings instead of its own.

    Raises KeyError for a setting that the option doesn't have.
    """
    content = read_file(f"quantizer/{option}")
    if unknown := settings.keys() - content.keys():
        raise KeyError(f"conf/quantizer/{option}.yaml has no {', '.join(sorted(unknown))}")
    return {**content, **settings}


def read_file(name: str) -> dict[str, Any]:
    """A YAML file of conf/, merged with the files that its defaults list includes at the same level."""
    text = files("codegrid.conf").joinpath(f"{name}.yaml").read_text("utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    merged: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):
            [(group, option)] = entry.items()
            merged |= read_file(f"{group.partition('@')[0].lstrip('/')}/{option}")
    return {**merged, **content}
