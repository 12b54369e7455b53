"""Run folders as a report reads them: configs, figures, series and pictures, but no checkpoints."""

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from codegrid.data.pixels import read_settings
from codegrid.engine.aliases import upgrade_config, upgrade_names
from codegrid.engine.card import display_command
from codegrid.engine.errors import InputError
from codegrid.engine.figures import is_figure
from codegrid.engine.folder import CONFIG, DOCTOR, METRICS, PICTURES, RECORD, read_record
from codegrid.engine.places import data_places
from codegrid.evaluation.scores import USUAL_PIXELS, upgrade_provenance
from codegrid.evaluation.units import describe_pixels, describe_shown

# Folders inside a run folder that are not searched; W&B's hold files called config.yaml too.
SKIPPED_FOLDERS = {"checkpoints", "csv", "pictures", "samples", "tensorboard", "wandb"}

REPORTED_STAGES = ("vqgan", "prior")
TOKENIZER_STAGES = ("vqgan", "import", "distill")  # whose runs have a tokenizer as any other

# What runs did whose configs lack these settings of a dataset, since they are of earlier versions.
EARLIER_DATA = {
    "range": [0, 65_535],
    "alpha": "white",
    "depth": 8,
    "fit": "crop",
    "tiles": None,
    "labels": None,
    "val_labels": None,
    "label": None,
    "file_column": None,
    "columns": [],
    "column_names": None,
    "mismatch": "stop",
}

# Recorded by the images of a run: the type of values follows from them. Which channels pictures show changes no image.
RECORDED_DATA = {"number_type", "show"}

# Settings of a dataset that don't change which images are validated on.
IGNORED_IMAGE_SETTINGS = {
    "batch_size",
    "cache",
    "cache_dir",
    "flip",
    "num_workers",
    "on_error",
    "reader_timeout",
    "seed",
}


@dataclass
class ReportedRun:
    """A finished training run, with the results of its evaluations.

    `figures` are all numbers; `provenance` describes how each was measured, and equal provenance means comparable.
    `tokenizer` is the run whose codes a prior learned, if it is in the report.
    """

    folder: Path
    stage: str
    id: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    command: str
    git: str | None
    time: str = ""  # of its start
    images_hash: str | None = (
        None  # of its first start, which in earlier versions depends on their place
    )
    figures: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    references: list[dict[str, Any]] = field(default_factory=list)  # classical codecs
    rates: list[dict[str, Any]] = field(default_factory=list)  # of nested codes, with their scores
    files: dict[str, Any] = field(default_factory=dict)  # figures of stage=compress
    pixels: Mapping[str, Any] = field(
        default_factory=lambda: USUAL_PIXELS
    )  # the range and the depth of its images
    shown: str = ""  # a sentence on what their pictures show
    images: str = ""  # a hash of the images that it was trained on, wherever they lay
    tokenizer: "ReportedRun | None" = None
    evaluated: bool = False

    @property
    def seed(self) -> Any:
        return self.config.get("seed")


@dataclass
class ReportedRuns:
    """All runs below the folders of a report."""

    runs: list[ReportedRun]
    problems: dict[Path, str]  # unusable folders, and why


class DamagedRun(ValueError):
    """A run folder that can't be used; the message is the reason."""


def find_runs(roots: Sequence[str]) -> ReportedRuns:
    """Read every run folder below `roots`; match evaluations with the runs that they are of, and priors with tokenizers."""
    problems: dict[Path, str] = {}
    runs: dict[str, ReportedRun] = {}
    evaluations: list[ReportedRun] = []
    compressions: list[ReportedRun] = []
    for folder in find_run_folders(roots):
        try:
            run = read_run(folder)
        except DamagedRun as error:
            problems[folder] = str(error)
            continue
        if run is None:
            continue
        if run.stage == "evaluate":
            if run.metrics.get("of_stage") != "samples":  # in a file, which belong to no run
                evaluations.append(run)
        elif run.stage == "compress":
            compressions.append(run)
        elif run.id in runs:
            problems[folder] = f"a copy of {runs[run.id].folder}: both have the id {run.id}"
        else:
            runs[run.id] = run
    # Later evaluations override earlier ones, and validation images override training images.
    evaluations.sort(key=lambda run: (run.metrics.get("split") == "val", run.time))
    for evaluation in evaluations:
        of = evaluation.metrics.get("of")
        if of in runs:
            apply_evaluation(runs[of], evaluation)
        else:
            problems[evaluation.folder] = (
                f"evaluates a run (id {of}) that is not below the folders of this report"
            )
    for compression in sorted(compressions, key=lambda run: run.time):
        of = compression.metrics.get("of")
        if not compression.metrics.get("n"):
            problems[compression.folder] = "has no files, since no image could be read"
        elif of in runs:
            runs[of].files = compression.metrics
        else:
            problems[compression.folder] = (
                f"has files of a prior (id {of}) that is not below the folders of this report"
            )
    for run in runs.values():
        if run.stage == "prior":
            run.tokenizer = runs.get(run.metrics.get("tokenizer_of", ""))
    unify_places(runs.values())
    for run in runs.values():
        complete_provenance(run)
    return ReportedRuns(list(runs.values()), problems)


def unify_places(runs: Iterable[ReportedRun]) -> None:
    """Give runs on the same images the same settings of where these are, so that data that moved between two runs of a sweep
    don't tell them apart."""
    names = data_places()
    first: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in runs:
        data = run.config.get("data")
        if not run.images or not isinstance(data, dict):
            continue
        known = first.setdefault((run.stage, str(data.get("_target_")), run.images), data)
        run.config["data"] = data | {name: known[name] for name in names if name in known}


def list_roots(runs: str | Sequence[str] | None) -> list[str]:
    """The folders that the setting `runs` names; InputError if there is none."""
    if not runs:
        raise InputError(
            "stage=report needs the runs to report on; add runs=<a run folder, or one that has some below>"
        )
    return [runs] if isinstance(runs, str) else [str(root) for root in runs]


def find_finished_runs(roots: list[str]) -> ReportedRuns:
    """The runs below `roots`; InputError if there is none."""
    reported = find_runs(roots)
    if not reported.runs:
        problems = [f"; {folder} is {reason}" for folder, reason in reported.problems.items()]
        raise InputError(
            f"runs={','.join(roots)} has no finished run of stage=vqgan or stage=prior{''.join(problems[:1])}; train one first"
        )
    return reported


def complete_provenance(run: ReportedRun) -> None:
    """Describe how figures without provenance were measured: on the validation images of the run itself."""
    source = run.tokenizer or run
    images = image_settings(source)
    for name in run.figures:
        about = run.provenance.get(name) or {"measured": "by the training run"}
        run.provenance[name] = {**about, "data": images} if "measured" in about else about
    run.provenance = upgrade_provenance(run.provenance, source.pixels)


def find_run_folders(roots: Sequence[str]) -> list[Path]:
    """Every run folder at or below `roots`, once each, in numeric order: 2_... before 10_..."""
    folders: dict[Path, Path] = {}
    for root in roots:
        if not Path(root).is_dir():
            raise InputError(
                f"runs={root} is not a folder; give a run folder, or one that has some below, such as runs/sweeps/<name>"
            )
        for path, subfolders, files in os.walk(root):
            subfolders[:] = [
                name
                for name in subfolders
                if name not in SKIPPED_FOLDERS and not name.startswith(".")
            ]
            if {CONFIG, RECORD} & set(files):
                folders.setdefault(Path(path).resolve(), Path(path))
    return sorted(folders.values(), key=numeric_order)


def numeric_order(path: Path) -> list[tuple[bool, int | str]]:
    """A sorting key that compares the numbers in a path by value."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in parts]


def read_run(folder: Path) -> ReportedRun | None:
    """The run of a folder; None for a stage that is not reported. DamagedRun if it is unfinished or can't be read."""
    config = upgrade_config(load_mapping(folder / CONFIG))
    stage = config.get("stage")
    stage = "vqgan" if stage in TOKENIZER_STAGES else stage
    if stage not in (*REPORTED_STAGES, "evaluate", "compress"):
        return None
    if not (folder / METRICS).is_file():
        raise DamagedRun(f"not finished: it has no {METRICS}{last_alarm(folder)}")
    metrics = upgrade_names(load_mapping(folder / METRICS))
    start = read_start_record(folder)
    folder_hash = sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    run = ReportedRun(
        folder,
        str(stage),
        str(metrics.get("id") or config.get("id") or folder_hash),
        config,
        metrics,
        str(start.get("command", "")),
        start.get("git"),
        str(start.get("time", "")),
        images_hash=(start.get("data") or {}).get("hash"),
        pictures=find_pictures(folder, metrics),
        images=read_image_hash(folder),
    )
    read_pixel_facts(run)
    run.figures = {name: float(value) for name, value in metrics.items() if is_figure(value)}
    if run.stage == "vqgan" and "bits_per_image" not in run.figures:
        bits = count_bits_per_image(run)
        if bits:
            run.figures["bits_per_image"] = bits
    return run


def read_pixel_facts(run: ReportedRun) -> None:
    """Set the range and the depth of a run's images, and what their pictures show, by its config."""
    data = run.config.get("data")
    if run.stage != "vqgan" or not isinstance(data, dict):
        return
    try:
        rules = read_settings(data)
    except InputError as error:
        raise DamagedRun(f"{CONFIG} has settings of images that can't be: {error}") from error
    run.pixels = describe_pixels(rules)
    run.shown = describe_shown(rules, int(data.get("channels") or 3))


def last_alarm(folder: Path) -> str:
    """The doctor's last alarm as the end of a sentence; empty if there was none."""
    file = folder / DOCTOR
    if not file.is_file():
        return ""
    return f"; the doctor reported: {file.read_text(errors='replace').strip().splitlines()[-1]}"


def load_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    try:
        text = file.read_text()
        if file.suffix == ".json":
            content = json.loads(text)
        else:
            content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise DamagedRun(f"{file.name} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DamagedRun(f"{file.name} can't be read ({reason})") from error
    if not isinstance(content, dict):
        raise DamagedRun(f"{file.name} holds no settings")
    return content


def read_start_record(folder: Path) -> dict[str, Any]:
    """How the run was started, from the first line of record.jsonl; later lines only have resume=. Empty if it is missing."""
    try:
        with (folder / RECORD).open() as lines:
            first = json.loads(next(lines))
    except (OSError, ValueError, StopIteration):
        return {}
    return first if isinstance(first, dict) else {}


def read_image_hash(folder: Path) -> str:
    """The hash of a run's images that does not depend on their place; empty if it recorded none, as in earlier versions."""
    data = read_record(folder, "data")
    return str(data.get("hash", "")) if isinstance(data, dict) and "images" in data else ""


def count_bits_per_image(run: ReportedRun) -> float | None:
    """Bits of an image's codes at equal length: positions * codebooks * log2 K; None without codes."""
    K, codes = run.metrics.get("K"), run.metrics.get("codes_per_image")
    if K is not None and codes is not None and is_figure(K) and is_figure(codes):
        return float(codes * math.log2(K))
    grid = run.metrics.get("grid")
    if K is None or not is_figure(K) or not isinstance(grid, list) or not all(map(is_figure, grid)):
        return None
    num_codebooks = run.config.get("quantizer", {}).get("num_codebooks", 1)
    return float(math.prod(grid) * num_codebooks * math.log2(K))


def find_pictures(folder: Path, metrics: dict[str, Any]) -> list[Path]:
    """The pictures that a run names, even if its folder was moved; or else the last one of each kind in the folder."""
    pictures = []
    for name in metrics.get("pictures") or []:
        path = Path(str(name))
        places = (folder / PICTURES / path.name, folder / path.name, path)
        pictures += [place for place in places if place.is_file()][:1]
    if pictures:
        return pictures
    files = sorted((folder / PICTURES).glob("*.png"))
    last_of_kind = {file.stem.rsplit("-", 1)[0]: file for file in files}
    return list(last_of_kind.values())


def apply_evaluation(run: ReportedRun, evaluation: ReportedRun) -> None:
    """Give a run the results of its evaluation, which override those of the training run."""
    provenance = evaluation.metrics.get("provenance") or {}
    default = {
        "measured": "by stage=evaluate",
        "split": evaluation.metrics.get("split"),
        "n": evaluation.metrics.get("n"),
    }
    for name, value in evaluation.figures.items():
        if name not in ("n", "seconds", "steps"):
            run.figures[name] = value
            run.provenance[name] = provenance.get(name) or default
    if evaluation.metrics.get("exact") is not None:
        run.metrics = {**run.metrics, "exact": evaluation.metrics["exact"]}
    run.pictures = [*evaluation.pictures, *run.pictures]
    references = evaluation.metrics.get("references") or []
    run.references = [codec for codec in references if isinstance(codec, dict)] or run.references
    rates = evaluation.metrics.get("rates") or []
    run.rates = [row for row in rates if isinstance(row, dict)] or run.rates
    run.evaluated = True


def image_settings(run: ReportedRun) -> dict[str, Any]:
    """The settings of a run's images, without those on how they are read and augmented, nor those that are as they always were."""
    settings = run.config.get("data")
    if not isinstance(settings, dict):
        return {}
    return {
        name: value
        for name, value in sorted(settings.items())
        if name not in IGNORED_IMAGE_SETTINGS | RECORDED_DATA
        and EARLIER_DATA.get(name, ...) != value
    }


def read_curve(folder: Path, name: str) -> list[tuple[float, float]]:
    """The (step, value) points of a series in the run's CSV logs.

    If a resumed run repeated some steps, its later log counts.
    """
    curve: dict[float, float] = {}
    files = sorted(
        folder.glob("csv/version_*/metrics.csv"),
        key=lambda file: int(re.sub(r"\D", "", file.parent.name) or 0),
    )
    for file in files:
        points = dict(read_column(file, name))
        if points:
            first = next(iter(points))
            curve = {step: value for step, value in curve.items() if step < first} | points
    return sorted(curve.items())


def read_column(file: Path, name: str) -> Iterator[tuple[float, float]]:
    """The finite points of a column; the last line of a killed run may be cut off."""
    try:
        with file.open(newline="", errors="replace") as lines:
            rows = csv.reader(lines)
            head = next(rows, [])
            if name not in head or "step" not in head:
                return
            step = head.index("step")
            column = head.index(name)
            for row in rows:
                if len(row) == len(head) and row[column]:
                    try:
                        point = float(row[step]), float(row[column])
                    except ValueError:
                        continue
                    if math.isfinite(point[1]):
                        yield point
    except (OSError, csv.Error):
        return


def rerun_command(run: ReportedRun) -> str:
    """The command that started the run, as a user types it; for a point of a sweep the point's own command."""
    return display_command(run.command) if run.command else ""
