"""Run folders as a report reads them: configs, figures, series and pictures, never a checkpoint."""

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from engine.aliases import upgrade_config
from engine.card import display_command
from engine.errors import InputError

INSIDE = {
    "checkpoints",
    "csv",
    "pictures",
    "samples",
    "tensorboard",
    "wandb",
}  # of a run folder: W&B has config.yaml files too

TRAINED = ("vqgan", "prior")

NOT_OF_THE_IMAGES = {"batch_size", "cache", "cache_dir", "flip", "num_workers", "on_error", "seed"}


@dataclass
class ReportedRun:
    """A finished training run, with what evaluations found out about it.

    `figures` are numbers alone; `provenance` says of each how it was measured, and equal ones are comparable. `tokenizer` is
    the run whose codes a prior learned, where that is known.
    """

    folder: Path
    stage: str
    id: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    command: str
    git: str | None
    time: str = ""  # when it was started
    figures: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    references: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: "ReportedRun | None" = None
    evaluated: bool = False

    @property
    def seed(self) -> Any:
        return self.config.get("seed")


@dataclass
class ReportedRuns:
    """All that lies below the folders of a report."""

    runs: list[ReportedRun]
    problems: dict[Path, str]  # folders that could not be used: why


class Damaged(ValueError):
    """A run folder that can't be used; the message says why."""


def find_runs(roots: Sequence[str]) -> ReportedRuns:
    """Read every run folder below these, and put evaluations to the runs that they judge and priors to their tokenizers."""
    problems: dict[Path, str] = {}
    runs: dict[str, ReportedRun] = {}
    judgements: list[ReportedRun] = []
    for folder in folders(roots):
        try:
            run = read_run(folder)
        except Damaged as error:
            problems[folder] = str(error)
            continue
        if run is None:
            continue
        if run.stage == "evaluate":
            judgements.append(run)
        elif run.id in runs:
            problems[folder] = f"a copy of {runs[run.id].folder}: both have the id {run.id}"
        else:
            runs[run.id] = run
    for judgement in sorted(
        judgements, key=lambda run: (run.metrics.get("split") == "val", run.time)
    ):  # what comes last counts
        of = judgement.metrics.get("of")
        if of in runs:
            adopt(runs[of], judgement)
        else:
            problems[judgement.folder] = (
                f"judges a run (id {of}) that is not below the folders of this report"
            )
    for run in runs.values():
        run.tokenizer = (
            runs.get(run.metrics.get("tokenizer_of", "")) if run.stage == "prior" else None
        )
    for run in runs.values():
        of_images = data(run.tokenizer or run)
        for name in (
            run.figures
        ):  # what has no provenance of its own was measured on the run's own validation images
            run.provenance[name] = run.provenance.get(name) or {"measured": "by the training run"}
            if "measured" in run.provenance[name]:
                run.provenance[name] = {**run.provenance[name], "data": of_images}
    return ReportedRuns(list(runs.values()), problems)


def folders(roots: Sequence[str]) -> list[Path]:
    """Every run folder at or below these, each once, 2_... before 10_..."""
    found: dict[Path, Path] = {}
    for root in roots:
        if not Path(root).is_dir():
            raise InputError(
                f"runs={root} is not a folder; give a run folder, or one that has some below, such as runs/sweeps/<name>"
            )
        for at, below, files in os.walk(root):
            below[:] = [name for name in below if name not in INSIDE and not name.startswith(".")]
            if {"config.yaml", "record.jsonl"} & set(files):
                found.setdefault(Path(at).resolve(), Path(at))
    return sorted(found.values(), key=lambda path: [(not part.isdigit(), int(part) if part.isdigit() else part) for part in
                                                    re.findall(r"\d+|\D+", str(path))])  # fmt: skip


def read_run(folder: Path) -> ReportedRun | None:
    """The run of a folder; None for a stage that has nothing to report. Damaged where it is not finished or can't be read."""
    config = upgrade_config(load(folder / "config.yaml"))
    stage = config.get("stage")
    if stage not in (*TRAINED, "evaluate"):
        return None
    if not (folder / "metrics.json").is_file():
        told = folder / "doctor.txt"
        said = (
            f"; the doctor said: {told.read_text(errors='replace').strip().splitlines()[-1]}"
            if told.is_file()
            else ""
        )
        raise Damaged(f"not finished: it has no metrics.json{said}")
    metrics = load(folder / "metrics.json")
    record = records(folder)
    run = ReportedRun(
        folder,
        str(stage),
        str(
            metrics.get("id")
            or config.get("id")
            or sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        ),
        config,
        metrics,
        str(record.get("command", "")),
        record.get("git"),
        str(record.get("time", "")),
        pictures=find_pictures(folder, metrics),
    )
    run.figures = {name: float(value) for name, value in metrics.items() if is_number(value)}
    if (
        run.stage == "vqgan"
        and "bits_per_image" not in run.figures
        and (bits := bits_per_image(run))
    ):
        run.figures["bits_per_image"] = bits
    return run


def load(file: Path) -> dict[str, Any]:
    """A mapping from a YAML or JSON file."""
    try:
        text = file.read_text()
        content = (
            json.loads(text)
            if file.suffix == ".json"
            else yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        )
    except FileNotFoundError:
        raise Damaged(f"{file.name} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Damaged(
            f"{file.name} can't be read ({' '.join(str(error).split())[:120]})"
        ) from error
    if not isinstance(content, dict):
        raise Damaged(f"{file.name} holds no settings")
    return content


def records(folder: Path) -> dict[str, Any]:
    """How the run was started: the first line of record.jsonl, for a later one only says resume=; empty where there is none."""
    try:
        with (folder / "record.jsonl").open() as lines:
            first = json.loads(next(lines))
    except (OSError, ValueError, StopIteration):
        return {}
    return first if isinstance(first, dict) else {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def bits_per_image(run: ReportedRun) -> float | None:
    """Bits that the codes of an image take, all alike: positions * codebooks * log2 K; None without codes."""
    K, grid = run.metrics.get("K"), run.metrics.get("grid")
    if K is None or not is_number(K) or not isinstance(grid, list) or not all(map(is_number, grid)):
        return None
    num_codebooks = run.config.get("quantizer", {}).get("num_codebooks", 1)
    return float(math.prod(grid) * num_codebooks * math.log2(K))


def find_pictures(folder: Path, metrics: dict[str, Any]) -> list[Path]:
    """The pictures that a run names, wherever its folder is now, or else the last of each kind in it."""
    named = [Path(str(name)) for name in metrics.get("pictures") or []]
    here = [
        next(
            (
                path
                for path in (folder / "pictures" / name.name, folder / name.name, name)
                if path.is_file()
            ),
            None,
        )
        for name in named
    ]
    if found := [path for path in here if path is not None]:
        return found
    kinds = {
        path.stem.rsplit("-", 1)[0]: path for path in sorted((folder / "pictures").glob("*.png"))
    }
    return list(kinds.values())


def adopt(run: ReportedRun, judgement: ReportedRun) -> None:
    """Put what an evaluation found out to its run; it wins over what training said of itself."""
    told = judgement.metrics.get("provenance") or {}
    basis = {
        "measured": "by stage=evaluate",
        "split": judgement.metrics.get("split"),
        "n": judgement.metrics.get("n"),
    }
    for name, value in judgement.figures.items():
        if name not in ("n", "seconds", "steps"):
            run.figures[name] = value
            run.provenance[name] = told.get(name) or basis
    run.metrics = {
        **run.metrics,
        **{
            name: value
            for name, value in judgement.metrics.items()
            if name == "exact" and value is not None
        },
    }
    run.pictures = [*judgement.pictures, *run.pictures]
    run.references = [
        each for each in judgement.metrics.get("references") or [] if isinstance(each, dict)
    ] or run.references
    run.evaluated = True


def data(run: ReportedRun) -> dict[str, Any]:
    """What a run's config says of its images, but for how they are read and augmented."""
    described = run.config.get("data")
    described = described if isinstance(described, dict) else {}
    return {
        name: value for name, value in sorted(described.items()) if name not in NOT_OF_THE_IMAGES
    }


def curve(folder: Path, name: str) -> list[tuple[float, float]]:
    """The (step, value) of a series in the run's CSV logs; where a resumed run went over steps again, its later log counts."""
    found: dict[float, float] = {}
    files = sorted(
        folder.glob("csv/version_*/metrics.csv"),
        key=lambda file: int(re.sub(r"\D", "", file.parent.name) or 0),
    )
    for file in files:
        points = list(read_series(file, name))
        if points:
            found = {step: value for step, value in found.items() if step < points[0][0]} | dict(
                points
            )
    return sorted(found.items())


def read_series(file: Path, name: str) -> Iterator[tuple[float, float]]:
    """The finite points of a column; the last line of a killed run may lack its end."""
    try:
        with file.open(newline="", errors="replace") as lines:
            rows = csv.reader(lines)
            head = next(rows, [])
            if name not in head or "step" not in head:
                return
            step, column = head.index("step"), head.index(name)
            for row in rows:
                if len(row) == len(head) and row[column]:
                    try:
                        value = float(row[step]), float(row[column])
                    except ValueError:
                        continue
                    if math.isfinite(value[1]):
                        yield value
    except (OSError, csv.Error):
        return


def command(run: ReportedRun) -> str:
    """What was typed to start the run, such as one can type it again; of a sweep's point its own."""
    return display_command(run.command) if run.command else ""
