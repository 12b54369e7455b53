"""The formats that there are: one file of this package each."""

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import vqgan.export
from codegrid.engine.cli import suggest
from codegrid.engine.errors import InputError
from vqgan.export.base import Exporter

NOT_FORMATS = ("decoder",)  # which is copied, not imported


def list_exporters() -> dict[str, Exporter]:
    """All formats by their names."""
    for module in iter_modules(vqgan.export.__path__):
        if module.name not in NOT_FORMATS:
            import_module(f"{vqgan.export.__name__}.{module.name}")
    return {kind.name: kind() for kind in sorted(Exporter.__subclasses__(), key=lambda k: k.name)}


def choose_exporters(formats: Any) -> list[Exporter]:
    """The formats of the setting `format`: a name or a list of names. Raises InputError for an unknown one, and for one that is
    named twice."""
    known = list_exporters()
    names = (
        [formats]
        if isinstance(formats, str) or not isinstance(formats, Sequence)
        else list(formats)
    )
    if not names:
        raise InputError(f"format=[] names no format; choose from {', '.join(known)}")
    for i, name in enumerate(names):
        if name not in known:
            raise InputError(
                f"format={name} does not exist{suggest(str(name), list(known))}; there is {', '.join(known)}"
            )
        if name in names[:i]:
            raise InputError(f"format names {name} twice; leave one out")
    return [known[name] for name in names]
