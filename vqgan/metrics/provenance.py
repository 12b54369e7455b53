"""Where a score comes from, and whether two of them may be compared. Imports no torch: reports read scores too."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.errors import InputError

Result = Mapping[str, Any]  # what metrics.json of stage=evaluate holds


def library(*packages: str) -> str:
    """Names and versions, without the part that says which processor a build is for."""
    return ", ".join(f"{package} {version(package).split('+')[0]}" for package in packages)


@dataclass
class Scores:
    """Scores under their names, each with its provenance, or None with the reason why it is absent.

    `common` is what the provenance of all begins with.
    """

    common: Mapping[str, Any]
    values: dict[str, float | int | bool | None] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, **provenance: Any) -> None:
        """A score, to five significant digits. JSON has no way to write what is not finite: it is absent."""
        if math.isfinite(value):
            self.values[name] = value if isinstance(value, int) else float(f"{value:.5g}")
            self.provenance[name] = {**self.common, **provenance}
        else:
            self.miss(name, "it is infinite: nothing was lost" if value > 0 else f"it came out as {value}")

    def miss(self, name: str, reason: str) -> None:
        self.values[name] = None
        self.absent[name] = reason


def comparable(name: str, results: Sequence[Result]) -> None:
    """Refuse, with InputError, scores `name` that are absent somewhere, or of different provenance."""
    for result in results:
        who = result.get("run", "a run")
        if result.get(name) is None:
            raise InputError(f"{name} of {who} is absent: {result.get('absent', {}).get(name, 'it was not computed')}")
        if name not in result.get("provenance", {}):
            raise InputError(f"{name} of {who} carries no provenance; compare what stage=evaluate writes")
    first, *others = results
    mine = first["provenance"][name]
    for other in others:
        theirs = other["provenance"][name]
        for key in {**mine, **theirs}:
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"{name} of {first.get('run')} and of {other.get('run')} can't be compared: {key} is {mine.get(key)} of the "
                    f"one and {theirs.get(key)} of the other; evaluate both alike"
                )


def difference(name: str, one: Result, other: Result) -> float:
    """The score `name` of one evaluation minus that of another; InputError where they are not `comparable`."""
    comparable(name, [one, other])
    return float(one[name]) - float(other[name])


def read_result(folder: str, of_stage: str) -> dict[str, Any]:
    """metrics.json of a run folder of stage=evaluate that judged a run of `of_stage`."""
    file = Path(folder).expanduser() / "metrics.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"beside={folder} has no metrics.json to read; give a run folder of stage=evaluate") from error
    if not isinstance(found, dict) or found.get("of_stage") != of_stage:
        raise InputError(f"beside={folder} is no evaluation of a run of stage={of_stage}, as this one is; give one that is")
    return found
