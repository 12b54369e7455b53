"""Figures as JSON that every reader accepts: a figure that is no number is null, with the reason why."""

import json
import math
from collections.abc import Mapping
from typing import Any

NO_REASONS: Mapping[str, str] = {}


def explain_non_finite(value: float) -> str:
    """Why a NaN or an infinity is absent, if nothing more is known."""
    if math.isnan(value):
        return "it is no number (NaN)"
    return "it is infinite" if value > 0 else "it is minus infinity"


def clean_figures(
    figures: Mapping[str, Any], reasons: Mapping[str, str] = NO_REASONS
) -> dict[str, Any]:
    """The figures with None for each NaN and infinity, at any depth, and below `absent` the reason for each.

    `reasons` are those that are known, by the figure's name; the name of a figure within another is dotted
    (references.0.psnr). Reasons that are in `absent` already stay, unless the figure is a number after all.
    """
    absent: dict[str, str] = {}

    def clean(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, f"{name}.{i}") for i, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            absent[name] = reasons.get(name) or explain_non_finite(value)
            return None
        return value

    cleaned = {name: clean(value, name) for name, value in figures.items()}
    earlier = figures.get("absent")
    if absent or isinstance(earlier, Mapping):
        remaining = {
            name: reason
            for name, reason in (earlier if isinstance(earlier, Mapping) else {}).items()
            if not is_figure(cleaned.get(name))
        }
        cleaned["absent"] = absent | remaining
    return cleaned


def is_figure(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_figures(figures: Mapping[str, Any], indent: int | None = None) -> str:
    """The figures as a JSON object, cleaned: json.dumps would write Infinity and NaN, which are not JSON."""
    return json.dumps(clean_figures(figures), indent=indent, allow_nan=False)
