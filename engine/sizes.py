"""Sizes in rows and columns, of images and of grids of codes: one number for a square, or [rows, columns]."""

from collections.abc import Sequence
from typing import Any

from codegrid.engine.errors import InputError

Size = tuple[int, int]  # rows, columns
SizeSetting = int | Sequence[int]  # 64 or [64, 96]


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(name: str, value: Any, unit: str, least: int = 1) -> Size:
    """A setting that is one number for a square, or [rows, columns], as both. Raises InputError for anything else."""
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(sides) in (1, 2) and all(is_whole(side) and side >= least for side in sides):
        return sides[0], sides[-1]
    shown = write_size(sides) if len(sides) > 1 else value
    raise InputError(
        f"{name}={shown} must be at least {least} {unit} a side: one whole number, or [rows,columns]"
    )


def to_setting(size: Size) -> int | list[int]:
    """A size as configs and the facts of a run have it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def divides(n: int, size: Size) -> bool:
    """Whether a number divides both sides."""
    return size[0] % n == 0 == size[1] % n


def round_to_multiples(size: Size, f: int) -> list[Size]:
    """The next smaller and the next larger size that f divides; the smaller one only if it has pixels."""
    below = tuple(side // f * f for side in size)
    above = tuple(-(-side // f) * f for side in size)
    return [(h, w) for h, w in (below, above) if h and w]


def write_size(size: Sequence[Any]) -> str:
    """A size as one types it: 64 for a square, otherwise [64,96]."""
    if len(size) == 2 and size[0] == size[1]:
        return str(size[0])
    return f"[{','.join(map(str, size))}]"
