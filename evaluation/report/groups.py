"""Runs that differ in their seed alone, and what they say together: means with intervals, apart where they can't be compared."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtrit

from evaluation.report.read import ReportedRun, is_number

ANYWHERE = {
    "seed",
    "cache_dir",
    "num_workers",
}  # settings that don't make another configuration, at whatever depth

AT_THE_TOP = {"id", "run_dir", "name", "resume", "ckpt", "run", "stage", "logger", "hydra"}

OF_THE_TRAINER = {"log_every", "save_every", "accelerator"}

SHAPE = (
    "grid",
    "K",
)  # as a run reports them, which also serves quantizers whose config doesn't say


@dataclass(frozen=True)
class Score:
    """How a figure is called, its unit, its decimals, and whether higher (1) or lower (-1) is better."""

    label: str
    unit: str = ""
    decimals: int = 3
    better: int = 0

    @property
    def axis(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, mean: "Mean", unit: bool = True) -> str:
        after = f" {self.unit}" if self.unit and unit else ""
        return f"{mean.text(self.decimals)}{after}"


SCORES = {
    "K": Score("K", "codes", 0),
    "psnr": Score("PSNR", "dB", 2, 1),
    "ssim": Score("SSIM", "", 3, 1),
    "ms_ssim": Score("MS-SSIM", "", 3, 1),
    "lpips": Score("LPIPS", "", 3, -1),
    "l1": Score("L1", "", 4, -1),
    "l2": Score("L2", "", 4, -1),
    "rfid": Score("rFID", "", 2, -1),
    "rfid_proxy": Score("rFID proxy", "", 3, -1),
    "kid": Score("KID", "", 4, -1),
    "kid_proxy": Score("KID proxy", "", 4, -1),
    "sharpness": Score("Sharpness", "", 3),
    "perplexity": Score("Perplexity", "codes", 1),
    "entropy_bits": Score("Entropy", "bits", 2),
    "codes_used": Score("Codes used", "", 0),
    "usage": Score("Usage", "", 3),
    "bits_per_image": Score("Rate", "bits/image", 0),
    "compression_ratio": Score("Compression", "×", 1),
    "gfid": Score("gFID", "", 2, -1),
    "gfid_proxy": Score("gFID proxy", "", 3, -1),
    "inception_score": Score("Inception Score", "", 2, 1),
    "inception_score_proxy": Score("Inception Score proxy", "", 2, 1),
    "precision": Score("Precision", "", 3, 1),
    "precision_proxy": Score("Precision proxy", "", 3, 1),
    "recall": Score("Recall", "", 3, 1),
    "recall_proxy": Score("Recall proxy", "", 3, 1),
    "density": Score("Density", "", 3, 1),
    "density_proxy": Score("Density proxy", "", 3, 1),
    "coverage": Score("Coverage", "", 3, 1),
    "coverage_proxy": Score("Coverage proxy", "", 3, 1),
    "nats_per_token": Score("Nats per token", "", 3, -1),
    "nearest_ratio": Score("Nearest ratio", "", 3),
    "seconds": Score("Training", "s", 0),
    "images_per_second": Score("Speed", "images/s", 0),
}


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds with half of its 95% confidence interval, which a single one doesn't have."""

    mean: float
    half: float | None
    n: int

    def text(self, decimals: int) -> str:
        """Without ± where all seeds agree, as they do in what follows from the settings."""
        return f"{self.mean:,.{decimals}f}" + (f" ± {self.half:.{decimals}f}" if self.half else "")

    @property
    def ends(self) -> tuple[float, float]:
        half = self.half or 0.0
        return self.mean - half, self.mean + half


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Student's t: mean ± t(0.975, n - 1) * s / sqrt n."""
    n = len(values)
    if n < 2:
        return Mean(float(values[0]), None, n)
    if min(values) == max(values):
        return Mean(float(values[0]), 0.0, n)
    return Mean(
        float(np.mean(values)),
        float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n)),
        n,
    )


@dataclass
class Group:
    """Runs of one configuration."""

    settings: dict[str, Any]  # the swept keys, and what they are here
    runs: list[ReportedRun] = field(default_factory=list)

    @property
    def name(self) -> str:
        return (
            ", ".join(setting(key, value) for key, value in self.settings.items())
            or "one configuration"
        )

    def setting(self, key: str) -> Any:
        """A setting of the runs, of priors also their tokenizers'."""
        return flat(self.runs[0]).get(key)


@dataclass
class Point:
    """What a group says of some scores."""

    group: Group
    runs: list[ReportedRun]
    means: dict[str, Mean]


@dataclass
class ComparablePart:
    """Points whose scores were measured alike, and how."""

    provenance: dict[str, dict[str, Any]]
    points: list[Point]


def setting(key: str, value: Any) -> str:
    """A setting in as few words as tell it: 8×8, K=512, quantizer=EMA."""
    if key == "grid":
        return str(value) if "×" in str(value) else f"{value}×{value}"
    return f"{short(key)}={choice(value)}"


def short(key: str) -> str:
    parts = [part for part in key.split(".") if part != "_target_"]
    return parts[-1]


def choice(value: Any) -> str:
    """A value as one reads it: of a class its name alone."""
    if value is None:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.rsplit(".", 1)[-1] if isinstance(value, str) else text


def flat(run: ReportedRun) -> dict[str, Any]:
    """All settings that make a run's configuration as "a.b.c", grid and K first; of a prior also those of its tokenizer."""
    found: dict[str, Any] = {}
    grid = run.metrics.get("grid")
    if isinstance(grid, list) and len(grid) == 2:
        found["grid"] = grid[0] if grid[0] == grid[1] else f"{grid[0]}×{grid[1]}"
    if is_number(run.metrics.get("K")):
        found["K"] = run.metrics["K"]

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if (
                key in ANYWHERE
                or (not prefix and key in AT_THE_TOP)
                or (prefix == "trainer." and key in OF_THE_TRAINER)
            ):
                continue
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(run.config, "")
    if run.stage == "prior":
        of = run.tokenizer
        told = flat(of) if of else {"run": run.metrics.get("tokenizer_of")}
        found |= {f"tokenizer.{key}": value for key, value in told.items()}
    return found


def find_varied(runs: Sequence[ReportedRun]) -> list[str]:
    """The settings that differ among the runs, each choice once.

    What follows from another choice is left out: a key below a `_target_` counts only where runs of one target differ in it, and
    of keys that always agree, or come and go together, the shortest stays.
    """
    all_flat = [flat(run) for run in runs]
    keys = {key: None for settings in all_flat for key in settings}
    chosen: dict[Any, str] = {}
    for key in keys:
        values = [repr(settings.get(key, ...)) for settings in all_flat]
        if len(set(values)) == 1 or not varies(key, all_flat, values):
            continue
        first: dict[str, int] = {}
        partition = tuple(first.setdefault(value, i) for i, value in enumerate(values))
        like = partition if repr(...) in values else tuple(values)
        if like not in chosen or simpler(key) < simpler(chosen[like]):
            chosen[like] = key
    found = list(chosen.values())
    return [key for key in SHAPE if key in found] + [key for key in found if key not in SHAPE]


def simpler(key: str) -> tuple[bool, int, int]:
    return not key.endswith("_target_") and key not in SHAPE, key.count("."), len(key)


def varies(key: str, all_flat: list[dict[str, Any]], values: list[str]) -> bool:
    """Whether runs that agree in every `_target_` above the key differ in it."""
    above = [key[: i + 1] + "_target_" for i, letter in enumerate(key) if letter == "."]
    above = [target for target in above if target != key]
    if not above:
        return True
    by_target: dict[Any, set[str]] = {}
    for settings, value in zip(all_flat, values, strict=True):
        by_target.setdefault(tuple(settings.get(target) for target in above), set()).add(value)
    return any(len(seen) > 1 for seen in by_target.values())


def groups(runs: Sequence[ReportedRun]) -> list[Group]:
    """Runs by configuration without seed, in the order of their settings."""
    keys, found = find_varied(runs), dict[str, Group]()
    for run in runs:
        own = {key: value for key, value in flat(run).items() if key in keys}
        settings = {key: own[key] for key in keys if key in own}
        for key in SHAPE:  # said even where they are the same everywhere: no name of a tokenizer is complete without
            if key not in settings and key in (all_of := flat(run)):
                settings[key] = all_of[key]
        settings = {**{key: settings[key] for key in SHAPE if key in settings}, **settings}
        found.setdefault(repr(settings), Group(settings)).runs.append(run)
    return sorted(
        found.values(), key=lambda group: [rank(group.settings.get(key)) for key in [*SHAPE, *keys]]
    )


def rank(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then the rest by name."""
    return (False, float(value), "") if is_number(value) else (True, 0.0, str(value))


def score_of(run: ReportedRun, name: str) -> tuple[float, dict[str, Any]] | None:
    """A figure and how it was measured; "tokenizer.psnr" of a prior is its tokenizer's."""
    rest = name.removeprefix("tokenizer.")
    judged = run.tokenizer if rest != name else run
    if name == "K" and is_number(run.metrics.get("K")):
        return float(run.metrics["K"]), {}
    if judged is None or rest not in judged.figures:
        return None
    return judged.figures[
        rest
    ], {} if rest == "bits_per_image" and judged.stage == "vqgan" else judged.provenance.get(
        rest, {}
    )


def parts(grouped: Iterable[Group], *names: str) -> list[ComparablePart]:
    """The points of all groups whose runs have all these scores, apart by how these were measured; the largest part first."""
    found: dict[str, ComparablePart] = {}
    for group in grouped:
        alike: dict[str, list[ReportedRun]] = {}
        for run in group.runs:
            told = {name: score_of(run, name) for name in names}
            if all(each is not None for each in told.values()):
                provenance = {name: each[1] for name, each in told.items() if each is not None}
                key = json.dumps(provenance, sort_keys=True, default=str)
                alike.setdefault(key, []).append(run)
                found.setdefault(key, ComparablePart(provenance, []))
        for key, runs in alike.items():
            found[key].points.append(
                Point(group, runs, {name: over_seeds(runs, name) for name in names})
            )
    return sorted(found.values(), key=lambda part: -sum(len(point.runs) for point in part.points))


def seed_of(run: ReportedRun) -> Any:
    """What runs of one configuration are told apart by: the seed, of a prior also its tokenizer's."""
    return run.id if run.seed is None else (run.seed, run.tokenizer.seed if run.tokenizer else None)


def over_seeds(runs: Sequence[ReportedRun], name: str) -> Mean:
    """The mean of a score over seeds; runs of one seed are no second look at chance, and count as their mean."""
    values: dict[Any, list[float]] = {}
    for run in runs:
        if each := score_of(run, name):
            values.setdefault(seed_of(run), []).append(each[0])
    return mean_over_seeds([float(np.mean(each)) for each in values.values()])


def ordered(points: Sequence[Point], name: str) -> list[Point]:
    """Points by the mean of a score, the best first."""
    sign = SCORES[name.removeprefix("tokenizer.")].better
    return sorted(points, key=lambda point: -sign * point.means[name].mean)
