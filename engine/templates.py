"""Text files from jinja2 templates."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render_template(
    file: Path,
    escape: bool,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """The text of a template with these values; `escape` makes them safe for HTML, `filters` are the template's own.

    A line with nothing but a block tag leaves no line in the text. An undefined value is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: not every run renders

    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(file.name).render(values)
