"""Runs grouped by configuration: means over seeds with intervals, kept apart if they can't be compared."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtrit

from codegrid.engine.figures import is_figure
from codegrid.engine.version import STAMP
from codegrid.evaluation.report.read import EARLIER_DATA, RECORDED_DATA, ReportedRun
from codegrid.evaluation.scores import SCORES, USUAL_PIXELS, Score, refer_to

# Settings that don't distinguish configurations: at any depth, at the top, and below trainer.
IGNORED_KEYS = {"seed", "cache_dir", "num_workers", "reader_timeout"}
IGNORED_AT_TOP = {
    "id", "run_dir", "name", "resume", "ckpt", "run", "stage", "logger", "hydra", "trust", "accelerator", "show", STAMP,
}  # fmt: skip
# Recorded by the images of a run; the names of its classes, endings of files, and what tables say of them follow from them.
IGNORED_IN_DATA = {"classes", "suffixes", "file_column", "column_names", *RECORDED_DATA}
IGNORED_IN_TRAINER = {"log_every", "save_every", "accelerator"}

KEY_SETTINGS = (
    "grid",
    "K",
)  # as runs report them, since the config of some quantizers doesn't have them

STARTING_SETTINGS = ("init", "codes", "condition")  # settings that may name another run

TOKENIZERS = "tokenizer."  # the prefix of settings and scores that a prior has from its tokenizer


def score_info(name: str, about: Mapping[str, Any] = USUAL_PIXELS) -> Score:
    """The line of the table of scores for a name, also one with the prefix of the tokenizer.

    It says which range the score refers to, by its provenance, if that is not the one of 8-bit images.
    """
    score = SCORES[name.removeprefix(TOKENIZERS)]
    is_usual = all(about.get(key) == value for key, value in USUAL_PIXELS.items())
    return score if is_usual else refer_to(score, about)


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds with half the width of its 95% confidence interval; one seed has none."""

    mean: float
    half: float | None
    n: int

    def text(self, decimals: int) -> str:
        """The mean ± half the interval; without ± if all seeds agree, as they do in what follows from the settings."""
        return f"{self.mean:,.{decimals}f}" + (f" ± {self.half:.{decimals}f}" if self.half else "")

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval."""
        half = self.half or 0.0
        return self.mean - half, self.mean + half


def format_mean(name: str, mean: Mean) -> str:
    """A mean of the score `name` with its decimals and unit."""
    score = score_info(name)
    return f"{mean.text(score.decimals)} {score.unit}".rstrip()


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Student's t: mean ± t(0.975, n - 1) * s / sqrt n."""
    n = len(values)
    if n < 2:
        return Mean(float(values[0]), None, n)
    if min(values) == max(values):
        return Mean(float(values[0]), 0.0, n)
    half = stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n)
    return Mean(float(np.mean(values)), float(half), n)


@dataclass
class Group:
    """The runs of one configuration; `settings` are the swept keys with their values here."""

    settings: dict[str, Any]
    runs: list[ReportedRun] = field(default_factory=list)

    @property
    def name(self) -> str:
        words = [format_setting(key, value) for key, value in self.settings.items()]
        return ", ".join(words) or "one configuration"

    def setting(self, key: str) -> Any:
        """A setting of the runs; for priors also one of their tokenizers."""
        return flatten_run(self.runs[0]).get(key)


@dataclass
class Point:
    """The means of some scores of a group."""

    group: Group
    runs: list[ReportedRun]
    means: dict[str, Mean]


@dataclass
class ComparablePart:
    """Points whose scores were measured in the same way, and that way."""

    provenance: dict[str, dict[str, Any]]
    points: list[Point]


def format_setting(key: str, value: Any) -> str:
    """A setting in a few words: 8×8, K=512, quantizer=EMA."""
    if key == "grid":
        return str(value) if "×" in str(value) else f"{value}×{value}"
    return f"{short_key(key)}={format_choice(value)}"


def short_key(key: str) -> str:
    """The last part of a key; for a class the part that it is chosen for."""
    return [part for part in key.split(".") if part != "_target_"][-1]


def format_choice(value: Any) -> str:
    """A value for the reader; a class is shown by its name."""
    if value is None:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.rsplit(".", 1)[-1] if isinstance(value, str) else text


def unify_starts(runs: Iterable[ReportedRun]) -> None:
    """Give runs that start from runs of one configuration the same `init`, `codes` and `condition`: seeds of a chain of runs are
    seeds, as they are of a single run. Starts that are not in the report stay what they are."""
    in_order = sorted(runs, key=lambda run: run.time)  # a start comes before what starts from it
    by_folder = {
        folder: run
        for run in in_order
        for folder in (str(run.folder.absolute()), run.metrics.get("run"))
    }
    first: dict[str, ReportedRun] = {}
    several = set[str]()
    named = list[tuple[ReportedRun, str]]()
    for run in in_order:
        for key in STARTING_SETTINGS:
            start = by_folder.get(str(run.config.get(key)))
            if start is None or start is run:
                continue
            known = first.setdefault(repr(flatten_run(start)), start)
            run.config[key] = known.folder.name
            named.append((run, key))
            if known is not start:
                several.add(known.folder.name)
    for run, key in named:
        if run.config[key] in several:
            run.config[key] += " and other seeds"


def flatten_run(run: ReportedRun) -> dict[str, Any]:
    """All settings that make up a run's configuration as "a.b.c", grid and K first; for a prior also its tokenizer's."""
    flat: dict[str, Any] = {}
    grid = run.metrics.get("grid")
    if isinstance(grid, list) and len(grid) == 2:
        flat["grid"] = shorten_grid(grid)
    if is_figure(run.metrics.get("K")):
        flat["K"] = run.metrics["K"]

    def collect(node: dict[str, Any], prefix: str) -> None:
        ignored = IGNORED_KEYS | (IGNORED_AT_TOP if not prefix else set())
        if prefix == "trainer.":
            ignored |= IGNORED_IN_TRAINER
        if prefix == "data.":
            ignored |= IGNORED_IN_DATA
        for key, value in node.items():
            if key in ignored or (prefix == "data." and EARLIER_DATA.get(key, ...) == value):
                continue
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = shorten_grid(value) if key == "grid" else value

    collect(run.config, "")
    if run.stage == "prior":
        of_tokenizer = {"run": run.metrics.get("tokenizer_of")}
        if run.tokenizer:
            of_tokenizer = flatten_run(run.tokenizer)
        flat |= {f"{TOKENIZERS}{key}": value for key, value in of_tokenizer.items()}
    return flat


def shorten_grid(grid: Any) -> Any:
    """[rows, columns] as a number for a square and 6×10 for a rectangle, whether a run or its config has it; others as they are."""
    if not isinstance(grid, list) or len(grid) != 2:
        return grid
    return grid[0] if grid[0] == grid[1] else f"{grid[0]}×{grid[1]}"


def find_varied(runs: Sequence[ReportedRun]) -> list[str]:
    """The settings that differ among the runs, once per choice.

    Consequences of another choice are left out: a key below a `_target_` counts only if runs with the same target differ in
    it, and of several keys that always agree, or are present in the same runs, the shortest counts.
    """
    all_flat = [flatten_run(run) for run in runs]
    keys = {key: None for settings in all_flat for key in settings}
    chosen: dict[Any, str] = {}
    for key in keys:
        values = [repr(settings.get(key, ...)) for settings in all_flat]
        if len(set(values)) == 1 or not varies_by_itself(key, all_flat, values):
            continue
        first_index: dict[str, int] = {}
        partition = tuple(first_index.setdefault(value, i) for i, value in enumerate(values))
        # A key that some runs lack stands for their having a part or not, whatever its values are.
        choice = partition if repr(...) in values else tuple(values)
        if choice not in chosen or simplicity(key) < simplicity(chosen[choice]):
            chosen[choice] = key
    varied = list(chosen.values())
    shape = [key for key in KEY_SETTINGS if key in varied]
    return shape + [key for key in varied if key not in KEY_SETTINGS]


def simplicity(key: str) -> tuple[bool, int, int]:
    """A sorting key: classes, grid and K before other settings, then by depth and length."""
    is_plain = not key.endswith("_target_") and key not in KEY_SETTINGS
    return is_plain, key.count("."), len(key)


def varies_by_itself(key: str, all_flat: list[dict[str, Any]], values: list[str]) -> bool:
    """Whether runs that agree in every `_target_` above the key differ in it."""
    above = [key[: i + 1] + "_target_" for i, letter in enumerate(key) if letter == "."]
    above = [target for target in above if target != key]
    if not above:
        return True
    by_target: dict[Any, set[str]] = {}
    for settings, value in zip(all_flat, values, strict=True):
        by_target.setdefault(tuple(settings.get(target) for target in above), set()).add(value)
    return any(len(options) > 1 for options in by_target.values())


def group_runs(runs: Sequence[ReportedRun]) -> list[Group]:
    """Runs grouped by their configuration without the seed, in the order of their settings."""
    keys = find_varied(runs)
    by_settings: dict[str, Group] = {}
    for run in runs:
        flat = flatten_run(run)
        # A tokenizer's name always has its grid and K, even if they are the same everywhere.
        settings = {key: flat[key] for key in dict.fromkeys([*KEY_SETTINGS, *keys]) if key in flat}
        by_settings.setdefault(repr(settings), Group(settings)).runs.append(run)

    def order(group: Group) -> list[tuple[bool, float, str]]:
        return [sort_key(group.settings.get(key)) for key in [*KEY_SETTINGS, *keys]]

    return sorted(by_settings.values(), key=order)


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers, and grids by their number of codes, then the rest by name."""
    if is_figure(value):
        return False, float(value), ""
    if sides := re.fullmatch(r"(\d+)×(\d+)", str(value)):
        return False, math.sqrt(int(sides[1]) * int(sides[2])), str(value)
    return True, 0.0, str(value)


def read_score(run: ReportedRun, name: str) -> tuple[float, dict[str, Any]] | None:
    """A score and how it was measured; "tokenizer.psnr" of a prior is its tokenizer's."""
    own_name = name.removeprefix(TOKENIZERS)
    source = run.tokenizer if own_name != name else run
    if name == "K" and is_figure(run.metrics.get("K")):
        return float(run.metrics["K"]), {}
    if source is None or own_name not in source.figures:
        return None
    about = source.provenance.get(own_name, {})
    if own_name == "bits_per_image":
        # The rate of a tokenizer follows from its settings, however the other scores were measured; that of a prior is what its
        # images take, and ranks nothing, so it is one axis for priors on different codes.
        about = {} if source.stage == "vqgan" else leave_out(about, "codes")
    # Runs of several seeds draw their samples by as many: what differs by seed is the error of their mean.
    return source.figures[own_name], leave_out(about, "seed")


def leave_out(about: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A provenance without what doesn't tell scores apart."""
    return {key: value for key, value in about.items() if key not in names}


def comparable_parts(grouped: Iterable[Group], *names: str) -> list[ComparablePart]:
    """The points of all groups whose runs have all these scores, one part per way of measuring; the largest part first."""
    by_provenance: dict[str, ComparablePart] = {}
    for group in grouped:
        runs_by_provenance: dict[str, list[ReportedRun]] = {}
        for run in group.runs:
            scores = {name: read_score(run, name) for name in names}
            provenance = {name: score[1] for name, score in scores.items() if score is not None}
            if len(provenance) == len(scores):
                key = provenance_key(provenance)
                runs_by_provenance.setdefault(key, []).append(run)
                by_provenance.setdefault(key, ComparablePart(provenance, []))
        for key, runs in runs_by_provenance.items():
            means = {name: mean_of_score(runs, name) for name in names}
            by_provenance[key].points.append(Point(group, runs, means))
    return sorted(
        by_provenance.values(), key=lambda part: -sum(len(point.runs) for point in part.points)
    )


def provenance_key(provenance: dict[str, Any]) -> str:
    """A text that is equal for equal provenance."""
    return json.dumps(provenance, sort_keys=True, default=str)


def seed_key(run: ReportedRun) -> Any:
    """What distinguishes runs of one configuration: the seed, for a prior also its tokenizer's."""
    return run.id if run.seed is None else (run.seed, run.tokenizer.seed if run.tokenizer else None)


def mean_of_score(runs: Sequence[ReportedRun], name: str) -> Mean:
    """The mean of a score over seeds. Several runs of one seed are not independent and count once, with their mean."""
    by_seed: dict[Any, list[float]] = {}
    for run in runs:
        score = read_score(run, name)
        if score:
            by_seed.setdefault(seed_key(run), []).append(score[0])
    return mean_over_seeds([float(np.mean(values)) for values in by_seed.values()])


def best_first(points: Sequence[Point], name: str) -> list[Point]:
    """Points by the mean of a score, the best first."""
    sign = score_info(name).better
    return sorted(points, key=lambda point: -sign * point.means[name].mean)
