"""Parts as conf/ describes them: a test passes the settings that it is about, and the YAML files provide the rest.

quantizer = make(VQ, K=8, dim=4)          # beta, decay, revive ... as in conf/quantizer/vq.yaml
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from hydra.utils import get_object
from omegaconf import OmegaConf

from tests.helpers.configs import ROOT

Part = TypeVar("Part")
CONF = ROOT / "conf"


@cache
def defaults_by_target() -> dict[str, dict[str, Any]]:
    """Map the full name of a class or function to its settings in conf/, in the first file that names it."""
    defaults: dict[str, dict[str, Any]] = {}
    for file in sorted(CONF.rglob("*.yaml")):
        _collect(_load(file.relative_to(CONF).with_suffix("").as_posix()), defaults)
    return defaults


def make(kind: Callable[..., Part], *args: Any, **settings: Any) -> Part:
    """`kind(*args, **settings)` with conf/'s values for all settings that are left out.

    Settings that conf/ takes from elsewhere (`${data.image_size}`) have to be passed.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    parameters = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    passed = (
        inspect.signature(kind).bind_partial(*args, **settings).arguments.keys() | settings.keys()
    )
    values = {
        key: _build(value)
        for key, value in defaults_by_target()[name].items()
        if key not in passed and (takes_any or key in parameters)
    }
    return kind(*args, **settings, **values)


def _load(name: str) -> Any:
    """A YAML file of conf/, merged with the files that its defaults list includes at the same level."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    merged: dict[str, Any] = {}
    for entry in content.pop("defaults", []) if isinstance(content, dict) else []:
        if isinstance(entry, dict):
            [(group, option)] = entry.items()
            if group.endswith("@_here_") and option is not None:
                merged |= _load(f"{group.removesuffix('@_here_').lstrip('/')}/{option}")
    return {**merged, **(content or {})}


def _collect(node: Any, defaults: dict[str, dict[str, Any]]) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            settings = {key: value for key, value in node.items() if not key.startswith("_")}
            defaults.setdefault(
                node["_target_"], {k: v for k, v in settings.items() if "${" not in str(v)}
            )
        for value in node.values():
            _collect(value, defaults)


def _build(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value and not value.get("_partial_"):
        own = {key: _build(v) for key, v in value.items() if not key.startswith("_")}
        return get_object(value["_target_"])(**own)
    return value
