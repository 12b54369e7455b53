"""Bad input: one sentence with the value, the rule and the way out."""

import math
from typing import Any

from codegrid.engine.program import PROGRAM


class InputError(ValueError):
    """Bad input from the user: one sentence with the value, the rule and the way out.

    The command prints its message without a traceback; every other exception is a bug and keeps its traceback.
    """


def find_mistake(error: BaseException | None) -> InputError | None:
    """The InputError among an exception and those that it was raised from, since Hydra wraps what it builds; or None."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def check_int(name: str, value: Any, least: int, unit: str = "") -> None:
    """Raise InputError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(
            f"{name}={value} must be a whole number of at least {least}{f' {unit}' if unit else ''}"
        )


def check_range(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise InputError unless `value` is a number from `least` to `most`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        rule = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise InputError(f"{name}={value} must be a number {rule}")


def explain_import(target: str) -> str:
    """The sentence for a class that is named and can't be imported."""
    module = target.rpartition(".")[0]
    return (
        f"{target} can't be imported; if it is a class of your own, put the folder of its module on PYTHONPATH "
        f"(PYTHONPATH=. {PROGRAM} ...), and see that python -c 'import {module}' works"
    )


SPEAK_FOR_THEMSELVES = (OSError, ValueError, RuntimeError, ImportError)


def summarize_error(error: BaseException) -> str:
    """An exception for a sentence: the first line of its message, after the name of its class if that is an unusual one.

    The lines after a first one that ends with a colon belong to it.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    if not lines:
        return name
    message = " ".join(lines) if lines[0].endswith(":") else lines[0]
    if len(message) > 200:
        message = f"{message[:197]}..."
    return message if isinstance(error, SPEAK_FOR_THEMSELVES) else f"{name}: {message}"
