"""Where a score comes from, and whether two of them may be compared. Imports no torch: reports read scores too."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.errors import InputError

MEANING = {  # of the scores, for the terminal
    "psnr": "dB, higher is better; the mean of each image's own",
    "ssim": "of 1, higher is better",
    "ms_ssim": "of 1, higher is better",
    "lpips": "lower is better",
    "l1": "lower is better; pixels from 0 to 1",
    "l2": "lower is better; pixels from 0 to 1",
    "sharpness": "1 is as sharp as the images",
    "perplexity": "so many codes, used alike, would have this entropy",
    "codes_used": "codes that occur",
    "entropy_bits": "bits a position that the codes take on average",
    "usage": "share of the codes that are used",
    "bits_per_image": "bits",
    "compression_ratio": "times smaller than its 8-bit pixels",
    "rfid": "lower is better",
    "gfid": "lower is better",
    "kid": "lower is better; it may be a little below 0",
    "inception_score": "higher is better",
    "precision": "share of samples that look like images",
    "recall": "share of images that samples could be",
    "density": "1 is that of the images",
    "coverage": "share of images with a sample nearby",
    "nats_per_token": "lower is better",
    "nearest_rmse_val": "the same of validation images",
    "nearest_rmse": "of 255: median distance of a sample to its nearest training image",
    "nearest_ratio_val": "the same of validation images",
    "nearest_ratio": "near 0 is a copy",
}

EvaluationResult = Mapping[str, Any]  # what metrics.json of stage=evaluate holds


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
            self.miss(
                name, "it is infinite: nothing was lost" if value > 0 else f"it came out as {value}"
            )

    def miss(self, name: str, reason: str) -> None:
        self.values[name] = None
        self.absent[name] = reason


def check_comparable(name: str, results: Sequence[EvaluationResult]) -> None:
    """Refuse, with InputError, scores `name` that are absent somewhere, or of different provenance."""
    for result in results:
        who = result.get("run", "a run")
        if result.get(name) is None:
            raise InputError(
                f"{name} of {who} is absent: {result.get('absent', {}).get(name, 'it was not computed')}"
            )
        if name not in result.get("provenance", {}):
            raise InputError(
                f"{name} of {who} carries no provenance; compare what stage=evaluate writes"
            )
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


def score_difference(name: str, one: EvaluationResult, other: EvaluationResult) -> float:
    """The score `name` of one evaluation minus that of another; InputError where they are not `comparable`."""
    check_comparable(name, [one, other])
    return float(one[name]) - float(other[name])


def read_result(folder: str, of_stage: str) -> dict[str, Any]:
    """metrics.json of a run folder of stage=evaluate that judged a run of `of_stage`."""
    file = Path(folder).expanduser() / "metrics.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"compare_to={folder} has no metrics.json to read; give a run folder of stage=evaluate"
        ) from error
    if not isinstance(found, dict) or found.get("of_stage") != of_stage:
        raise InputError(
            f"compare_to={folder} is no evaluation of a run of stage={of_stage}, as this one is; give one that is"
        )
    return found
