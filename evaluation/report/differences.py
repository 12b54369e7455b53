"""Differences between configurations, paired by seed, and runs whose seed chose their validation images too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from codegrid.evaluation.report.groups import (
    Group,
    Mean,
    leave_out,
    mean_over_seeds,
    provenance_key,
    read_score,
    seed_key,
)
from codegrid.evaluation.report.read import ReportedRun

Provenance = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """The mean of one configuration's score minus another's; `paired` if it was taken within each seed."""

    mean: Mean
    paired: bool


def compare_groups(
    one: Group, other: Group, name: str, provenance: Provenance
) -> Difference | None:
    """The score of `one` minus that of `other`, where it was measured as `provenance` says; None without a common seed.

    Runs of one seed share what the seed decides: the order of images, the first weights, and before data.split_seed also
    which images validate. Their difference is free of it, so differences are paired by seed: a t interval of the mean of
    the differences within each seed. Each pair was judged on the same images, which may be others for another seed.
    Without two common seeds the interval is Welch's (1947), of two independent means.
    """
    mine, theirs = (scores_by_seed(group, name, provenance) for group in (one, other))
    within: dict[Any, list[float]] = {}
    for (seed, key), value in mine.items():
        if (seed, key) in theirs:
            within.setdefault(seed, []).append(value - theirs[seed, key])
    differences = [float(np.mean(values)) for values in within.values()]
    if len(differences) < 2:
        of_part = provenance_key(provenance)
        samples = [
            [value for (_, key), value in scores.items() if key == of_part]
            for scores in (mine, theirs)
        ]
        if min(map(len, samples)) >= 2:
            return Difference(welch_interval(*samples), paired=False)
    return Difference(mean_over_seeds(differences), paired=True) if differences else None


def scores_by_seed(group: Group, name: str, provenance: Provenance) -> dict[tuple[Any, str], float]:
    """The score for each seed and each set of images that it was measured on; several runs of both count as their mean."""
    wanted = provenance_key(without_reference(provenance))
    values: dict[tuple[Any, str], list[float]] = {}
    for run in group.runs:
        score = read_score(run, name)
        if score and provenance_key(without_reference(score[1])) == wanted:
            values.setdefault((seed_key(run), provenance_key(score[1])), []).append(score[0])
    return {key: float(np.mean(some)) for key, some in values.items()}


def without_reference(provenance: Provenance) -> Provenance:
    """A provenance without the hashes of the images that a score was measured on, of a ratio also those that it is relative to."""
    about = leave_out(provenance, "reference_hash", "judged_hash")
    if isinstance(real := about.get("real"), Mapping):
        about["real"] = leave_out(real, "judged_hash")
    return about


def welch_interval(one: Sequence[float], other: Sequence[float]) -> Mean:
    """The difference of the means of two independent samples, both of at least two values, with its 95% interval."""
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (one, other)]
    difference = float(np.mean(one) - np.mean(other))
    n = min(len(one), len(other))
    if not any(parts):
        return Mean(difference, 0.0, n)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(other) - 1))
    return Mean(difference, float(stdtrit(freedom, 0.975) * math.sqrt(sum(parts))), n)


def seed_moves_images(group: Group) -> bool:
    """Whether the runs of a group with several seeds were judged on other images for each seed.

    Runs from before data.split_seed, or with null, held out images that the seed chose. The hashes of the images in
    record.jsonl show it, where the runs have them.
    """
    if len({seed_key(run) for run in group.runs}) < 2:
        return False
    sources = [run.tokenizer or run for run in group.runs]
    if not all(map(draws_images_by_seed, sources)):
        return False
    hashes = {source.seed: source.images_hash for source in sources}
    known = set(hashes.values()) - {None}
    return len(hashes) > 1 and (len(known) > 1 or None in hashes.values())


def draws_images_by_seed(run: ReportedRun) -> bool:
    """Whether a run's config lets its seed choose the validation images."""
    settings = run.config.get("data")
    if not isinstance(settings, dict) or settings.get("split_seed") is not None:
        return False
    if str(settings.get("_target_", "")).endswith(".Shapes"):  # they are drawn, by the seed
        return True
    has_own = settings.get("val_root") or settings.get("val")
    return (
        settings.get("n_val") is not None
        and settings.get("held_out", "random") == "random"
        and not has_own
    )
