"""What a report shows of its runs: the sentences at its head, its charts, tables and pictures, and what is missing."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from codegrid.engine.figures import explain_non_finite, is_figure
from codegrid.engine.words import format_word
from codegrid.evaluation.report import charts, rate_curves
from codegrid.evaluation.report.differences import Difference, compare_groups, seed_moves_images
from codegrid.evaluation.report.figure import Chart, report_style
from codegrid.evaluation.report.groups import (
    TOKENIZERS,
    ComparablePart,
    Group,
    Mean,
    Point,
    best_first,
    comparable_parts,
    find_varied,
    flatten_run,
    format_choice,
    format_mean,
    format_setting,
    group_runs,
    provenance_key,
    score_info,
    seed_key,
    short_key,
    sort_key,
)
from codegrid.evaluation.report.read import ReportedRun, ReportedRuns
from codegrid.evaluation.scores import SCORES, ratio_name

# The scores that get charts; all others are in the tables. Fréchet distances are shown relative to that of real images.
RECONSTRUCTION = ("psnr", "rfid", "rfid_proxy")
GENERATION = ("gfid", "gfid_proxy", "nats_per_token")
OF_BOTH_STAGES = (("rfid", "gfid"), ("rfid_proxy", "gfid_proxy"))  # in the same features

RATE = "bits_per_image"

NEAR_DB = (
    0.5  # a configuration this close to the best PSNR is worth a sentence if it takes fewer bits
)

MAX_PARTS = 3  # ways of measuring one score that get a chart each

DAGGER = "†"

FILE_FIGURES = ("n", "psnr", "bytes", "payload_bytes", "claimed_bytes")  # of stage=compress


@dataclass
class Section:
    """A heading and charts."""

    title: str
    charts: list[Chart]


@dataclass
class Cell:
    """What a table shows, and the value that it is sorted by."""

    text: str
    value: float | str | None = None


@dataclass
class StoryTable:
    """Rows of cells below heads of (name, unit); each row with the runs that it is about."""

    name: str
    title: str
    words: str
    heads: list[list[str]]
    rows: list[tuple[list[Cell], list[ReportedRun]]] = field(default_factory=list)


@dataclass
class ShownPicture:
    """A picture of a run; the title says why it is shown, the caption which channels and values, if these are not all."""

    title: str
    run: ReportedRun
    file: Path
    caption: str = ""


class Story:
    """Everything that a report shows."""

    def __init__(self, reported: ReportedRuns) -> None:
        self.reported = reported
        self.tokenizers = [run for run in reported.runs if run.stage == "vqgan"]
        self.priors = [run for run in reported.runs if run.stage == "prior"]
        self.of_tokenizers = group_runs(self.tokenizers)
        self.of_priors = group_runs(self.priors)
        self.reconstruction = [self.relative(name) for name in RECONSTRUCTION]
        self.generation = [self.relative(name) for name in GENERATION]
        self.of_both_stages = [tuple(map(self.relative, pair)) for pair in OF_BOTH_STAGES]
        self.notes: list[str] = []  # on scores that can't be compared
        with report_style():
            self.sections = [section for section in self.draw_sections() if section.charts]
        self.head = list(self.write_head())
        self.missing = list(self.suggest_runs())
        self.tables = list(self.make_tables())
        self.shown = list(self.choose_pictures())

    def groups_with(self, name: str) -> list[Group]:
        """The groups that have this score: those of priors for "tokenizer.rfid" and for the scores of priors alone."""
        is_of_priors = name.startswith(TOKENIZERS) or "vqgan" not in score_info(name).stages
        return self.of_priors if is_of_priors else self.of_tokenizers

    def main_part(self, *names: str) -> ComparablePart | None:
        """The largest set of points whose scores can be compared."""
        parts = comparable_parts(self.groups_with(names[-1]), *names)
        return parts[0] if parts else None

    def relative(self, name: str) -> str:
        """The ratio of a Fréchet distance to that of real images; the distance itself if more runs have it, as earlier evaluations
        did, and a score that is no such distance."""
        ratio = ratio_name(name)
        counts = [sum(each in run.figures for run in self.reported.runs) for each in (ratio, name)]
        return ratio if SCORES[name].frechet and counts[0] >= max(counts[1], 1) else name

    # The head.

    def write_head(self) -> Iterator[str]:
        """The sentences at the head of the report."""
        yield self.count_runs()
        for name in self.reconstruction:
            if part := self.main_part(RATE, name):
                yield from self.name_winner(part, name, RATE)
        yield from self.compare_to_classical_vq()
        for _, name in self.of_both_stages:
            if part := self.main_part(name):
                with_bits = self.main_part(RATE, name)
                if with_bits and len(with_bits.points) == len(part.points):
                    yield from self.name_winner(with_bits, name, RATE)
                else:
                    yield from self.name_winner(part, name, None)
        for pair in self.of_both_stages:
            yield from self.compare_stages(*pair)
        yield from self.note_moved_images()
        yield from self.note_absent()

    def note_moved_images(self) -> Iterator[str]:
        """That the seed chose the validation images too, in runs from before data.split_seed."""
        grouped = [*self.of_tokenizers, *self.of_priors]
        n = sum(map(seed_moves_images, grouped))
        if n:
            yield (
                f"In {n} of {format_count(len(grouped), 'configuration')} the seed also chose the validation images, as in "
                "runs from before data.split_seed and in data=shapes: their ± contain how sets of images differ. "
                "Differences are taken within each seed, on the same images."
            )

    def note_absent(self) -> Iterator[str]:
        """The figures that training runs could not measure, and why."""
        counts: dict[tuple[str, str], int] = {}
        for run in (*self.tokenizers, *self.priors):
            for name in usable_names(run):
                if reason := explain_absence(run, name):
                    counts[name, reason] = counts.get((name, reason), 0) + 1
        for (name, reason), n in counts.items():
            again = "; stage=evaluate measures it" if name == "psnr" else ""
            yield f"{score_info(name).label} of {format_count(n, 'run')} is left out: {reason}{again}."

    def count_runs(self) -> str:
        """How many runs there are, and in which settings they differ."""
        counts = []
        for runs, grouped, kind in (
            (self.tokenizers, self.of_tokenizers, "tokenizer"),
            (self.priors, self.of_priors, "prior"),
        ):
            if runs:
                n = sorted({len(set(map(seed_key, group.runs))) for group in grouped})
                each = format_count(n[0], "seed") if len(n) == 1 else f"{n[0]} to {n[-1]} seeds"
                configurations = format_count(len(grouped), "configuration")
                counts.append(f"{format_count(len(runs), kind)} in {configurations} ({each} each)")
        sentence = " and ".join(counts)
        keys = find_varied(self.tokenizers) + [
            key
            for key in find_varied(self.priors)
            if key not in ("grid", "K") and not key.startswith(TOKENIZERS)
        ]
        if not keys:
            return f"{sentence}."
        values = [f"{short_key(key)} ({self.list_choices(key)})" for key in keys[:4]]
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        return f"{sentence}; they differ in {', '.join(values)}{more}."

    def list_choices(self, key: str) -> str:
        """The values of a swept key, in a few words."""
        choices = {}
        for run in self.reported.runs:
            value = flatten_run(run).get(key)
            if value is not None:
                choices[repr(value)] = value
        values = sorted(choices.values(), key=sort_key)
        words = [
            format_setting(key, value) if key == "grid" else format_choice(value)
            for value in values
        ]
        if len(words) <= 6:
            return ", ".join(words)
        return f"{words[0]} to {words[-1]}, {len(words)} values"

    def name_winner(self, part: ComparablePart, name: str, rate: str | None) -> Iterator[str]:
        """The best configuration by a score, those that can't be distinguished from it, and one that is close at fewer bits."""
        label = score_info(name).label
        top = best_first(part.points, name)[0]
        best = top.means[name]
        if len(part.points) == 1:
            yield f"{label}: {format_mean(name, best)} ({top.group.name}; {format_seeds(top)})."
            return
        at = f" at {top.means[rate].mean:,.0f} bits" if rate else ""
        if rate and top.runs[0].stage == "prior":
            at += " under the prior"
        yield (
            f"Best {label}{at}: {top.group.name}, {format_mean(name, best)} ({format_seeds(top)})"
            f"{compare_winner(part, top, name, rate)}."
        )
        if name == "psnr" and rate:
            near = [p for p in part.points if p.means[name].mean >= best.mean - NEAR_DB]
            small = min(near, key=lambda p: (p.means[rate].mean, -p.means[name].mean))
            if small.means[rate].mean < top.means[rate].mean:
                lead = compare_groups(top.group, small.group, name, part.provenance[name])
                less = lead.mean if lead else Mean(best.mean - small.means[name].mean, None, 1)
                yield (
                    f"Within {NEAR_DB:g} dB of it at the fewest bits: {small.group.name}, "
                    f"{format_mean(name, small.means[name])} at {small.means[rate].mean:,.0f} bits "
                    f"({format_mean(name, less)} less)."
                )

    def compare_stages(self, of_tokenizer: str, of_prior: str) -> Iterator[str]:
        """That the tokenizer with the best reconstructions is not the one whose prior draws the best samples, if so."""
        x = f"{TOKENIZERS}{of_tokenizer}"
        part = self.main_part(x, of_prior)
        if part is None:
            return
        tokenizer = tokenizer_key(best_first(part.points, x)[0].group)
        by_samples = best_first(part.points, of_prior)
        samples = by_samples[0]
        if tokenizer_key(samples.group) == tokenizer:
            return
        reconstructions = next(p for p in by_samples if tokenizer_key(p.group) == tokenizer)
        labels = [score_info(name).label for name in (of_tokenizer, of_prior)]
        yield (
            f"{' and '.join(labels)} disagree on the winner: the tokenizer of {reconstructions.group.name} reconstructs best "
            f"({describe_lead(part, reconstructions, samples, x)}), that of {samples.group.name} gives the best samples "
            f"({describe_lead(part, samples, reconstructions, of_prior)})."
        )

    def compare_to_classical_vq(self) -> Iterator[str]:
        """The PSNR of tokenizers above classical vector quantization at their own rates, interpolated between its settings."""
        part = self.main_part(RATE, "psnr")
        if part is None:
            return
        curves = charts.codec_curves(self.references(part.provenance["psnr"]), "psnr")
        curve = curves.get("classical VQ", {})
        bits = sorted(curve)
        gains = {}
        for point in part.points if bits else ():
            rate = point.means[RATE].mean
            if bits[0] <= rate <= bits[-1]:
                classical = np.interp(np.log(rate), np.log(bits), [curve[b] for b in bits])
                gains[point.group.name] = point.means["psnr"].mean - float(classical)
        if gains:
            most = max(gains, key=gains.__getitem__)
            least = min(gains, key=gains.__getitem__)
            to = f" to {gains[least]:+.2f} dB ({least})" if most != least else ""
            yield f"PSNR against classical VQ at the same rate: {gains[most]:+.2f} dB ({most}){to}."

    # The charts.

    def draw_sections(self) -> Iterator[Section]:
        """All charts that the runs have data for."""
        distances: list[Chart] = []
        for pair in self.of_both_stages:
            for stage, name in zip(("rate", "likelihood"), pair, strict=True):
                distances += self.draw_parts(f"{stage}-{name}", (RATE, name), self.draw_rate_chart)
        yield Section("Bits and distance to the images", distances)
        rates = self.draw_parts("rate-psnr", (RATE, "psnr"), self.draw_rate_chart)
        for name in ("psnr", "rfid_proxy"):
            rates += self.draw_run_rates(name)
        yield Section("Rate and distortion", rates)
        yield Section("Which grid, which K, which width", self.draw_heat_maps())
        samples: list[Chart] = []
        for _, name in self.of_both_stages:
            names = (f"{TOKENIZERS}{RATE}", name)
            samples += self.draw_parts(f"rate-{name}", names, self.draw_rate_chart)
        for x, y in self.of_both_stages:
            samples += self.draw_parts(
                f"{x}-{y}",
                (f"{TOKENIZERS}{x}", y),
                lambda file, part: charts.draw_score_pair(file, part, *part.provenance),
            )
        yield Section("Good reconstructions, good samples", samples)
        learning = self.draw_parts("perplexity", ("K", "perplexity"), charts.draw_code_use)
        for grouped, name in ((self.of_tokenizers, "psnr"), (self.of_priors, "nats_per_token")):
            part = self.main_part(name)
            about = score_info(name, part.provenance[name]) if part else SCORES[name]
            chart = charts.draw_learning_curves(f"learning-{name}", grouped, f"val/{name}", about)
            learning += [chart] if chart else []
        yield Section("The use of codes, and learning", learning)

    def draw_heat_maps(self) -> list[Chart]:
        """Maps of each score by K and grid, and by K and the width of a code or of the model."""
        maps: list[Chart] = []
        for across, down in (("K", "grid"), ("quantizer.dim", "K"), ("model.width", "K")):
            for name in (*self.reconstruction, "perplexity", *self.generation):
                prefix = TOKENIZERS if name in self.generation and "." in across else ""
                maps += self.draw_parts(
                    f"map-{name}-{down}-{short_key(across)}",
                    (name,),
                    partial(charts.draw_heat_map, score=name, across=prefix + across, down=down),
                )
        return maps

    def draw_parts(
        self,
        file: str,
        names: Sequence[str],
        draw: Callable[[str, ComparablePart], Chart | None],
    ) -> list[Chart]:
        """A chart for each way in which the scores were measured, never two on one axis; and a note if there are several."""
        name = names[-1]
        parts = comparable_parts(self.groups_with(name), *names)
        drawn = []
        for i, part in enumerate(parts[:MAX_PARTS]):
            has_codecs = name == "psnr" and bool(self.references(part.provenance[name]))
            if len(part.points) < 2 and not has_codecs:
                continue  # a single point is a sentence in the head
            chart = draw(file if i == 0 else f"{file}-{i + 1}", part)
            if chart is not None:
                if len(parts) > 1:
                    chart.caption += f" Measured: {format_provenance(part, name)}."
                drawn.append(chart)
        if len(parts) > 1 and drawn:
            ways = "; ".join(
                f"{format_count(sum(len(p.runs) for p in part.points), 'run')}: {format_provenance(part, name)}"
                for part in parts
            )
            note = (
                f"{score_info(name).label} was measured in {len(parts)} ways, "
                f"which are never on one axis or in one mean ({ways})."
            )
            if note not in self.notes:
                self.notes.append(note)
        return drawn

    def draw_rate_chart(self, file: str, part: ComparablePart) -> Chart:
        rate, score = part.provenance
        curves = charts.codec_curves(self.references(part.provenance[score]), score)
        is_likelihood = rate == RATE and part.points[0].runs[0].stage == "prior"
        axis = charts.LIKELIHOOD_AXIS if is_likelihood else charts.RATE_AXIS
        return charts.draw_rate_curves(file, part, (rate, score), curves, axis)

    def draw_run_rates(self, name: str) -> list[Chart]:
        """The rate-distortion curves of runs whose codes are nested, a chart for each way in which the score was measured."""
        nested = [group for group in self.of_tokenizers if any(run.rates for run in group.runs)]
        parts = comparable_parts(nested, name)
        drawn = []
        for i, part in enumerate(parts[:MAX_PARTS]):
            file = f"run-rates-{name}" + (f"-{i + 1}" if i else "")
            references = self.references(part.provenance[name])
            chart = rate_curves.draw_run_rates(file, part, name, references)
            if chart is None:
                continue
            if len(parts) > 1:
                chart.caption += f" Measured: {format_provenance(part, name)}."
            drawn.append(chart)
        return drawn

    def references(self, provenance: dict[str, Any]) -> list[dict[str, Any]]:
        """The scores of classical codecs on the images that a PSNR of this provenance was measured on."""
        key = provenance_key(provenance)
        alike = [
            run for run in self.tokenizers if provenance_key(run.provenance.get("psnr", {})) == key
        ]
        return [reference for run in alike for reference in run.references]

    # The tables.

    def make_tables(self) -> Iterator[StoryTable]:
        """Configurations with their means, then all runs; tokenizers before priors."""
        for grouped, kind in ((self.of_tokenizers, "tokenizers"), (self.of_priors, "priors")):
            if grouped:
                yield from self.tables_of(grouped, kind)
        yield from self.tabulate_files()

    def tabulate_files(self) -> Iterator[StoryTable]:
        """What images take as files under priors, beside other formats at no lower PSNR; nothing without stage=compress."""
        heads = [
            "Prior",
            "Format",
            "Images",
            "PSNR",
            "Bytes",
            "Without headers",
            "Claimed by the prior",
        ]
        table = StoryTable(
            "files",
            "Files",
            "Bytes of an image as written, headers counted and not counted. Other formats have the lowest quality whose PSNR is no "
            "lower, for up to 200 of the images.",
            [[head, "dB" if head == "PSNR" else ""] for head in heads],
        )
        for run in self.priors:
            own = {**run.files, "bytes": run.files.get("bytes_per_image")}
            others = [row for row in run.files.get("formats") or [] if isinstance(row, dict)]
            for row in [own, *others] if run.files else ():
                place, name = self.place(run), str(row.get("format", "cgz"))
                figures = [row.get(key) for key in FILE_FIGURES]
                cells = [Cell(place, place), Cell(name, name), *map(file_cell, figures)]
                table.rows.append((cells, [run]))
        if table.rows:
            yield table

    def tables_of(self, grouped: Sequence[Group], kind: str) -> Iterator[StoryTable]:
        """The tables of configurations and of runs."""
        keys = list(dict.fromkeys(key for group in grouped for key in group.settings))
        usual = usual_provenance(grouped, self.reconstruction if kind == "priors" else ())
        setting_heads = [[short_key(key), ""] for key in keys]
        score_heads = [column_head(name, kind, json.loads(key)) for name, key in usual.items()]
        configurations = StoryTable(
            f"configurations-{kind}",
            f"Configurations: {kind}",
            "Means over seeds ± half of the 95% interval.",
            [*setting_heads, ["Seeds", ""], *score_heads],
        )
        single_runs = StoryTable(
            f"runs-{kind}",
            f"Runs: {kind}",
            "Click a row to see the command behind it.",
            [["Run", ""], *setting_heads, ["Seed", ""], *score_heads],
        )
        for group in grouped:
            settings = [setting_cell(key, group.settings.get(key)) for key in keys]
            seeds = Cell(str(len(group.runs)), len(group.runs))
            cells = [*settings, seeds, *score_cells(group, usual)]
            configurations.rows.append((cells, group.runs))
            for run in group.runs:
                place = self.place(run)
                seed = Cell(format_choice(run.seed), run.seed if is_figure(run.seed) else None)
                scores = score_cells(Group(group.settings, [run]), usual)
                single_runs.rows.append(([Cell(place, place), *settings, seed, *scores], [run]))
        yield configurations
        yield from self.differences_of(grouped, kind, keys)
        yield single_runs

    def differences_of(
        self, grouped: Sequence[Group], kind: str, keys: Sequence[str]
    ) -> Iterator[StoryTable]:
        """The table of differences from the best configuration of each score; none if no two have two seeds in common."""
        columns = {}
        provenance = {}
        for name, score in SCORES.items():
            is_ranked = score.in_tables and score.better and self.ranks_groups(name)
            parts = comparable_parts(grouped, name) if is_ranked else []
            if parts and len(parts[0].points) > 1:
                columns[name] = difference_cells(grouped, name, parts[0])
                provenance[name] = parts[0].provenance[name]
        columns = {
            name: cells for name, cells in columns.items() if any("±" in c.text for c in cells)
        }
        if not columns:
            return
        table = StoryTable(
            f"differences-{kind}",
            f"Differences: {kind}",
            "Each score minus that of its best configuration: the mean of the differences within each seed ± half of its 95% "
            "interval.",
            [
                *([short_key(key), ""] for key in keys),
                *(column_head(name, kind, provenance[name]) for name in columns),
            ],
        )
        for i, group in enumerate(grouped):
            settings = [setting_cell(key, group.settings.get(key)) for key in keys]
            table.rows.append(([*settings, *(cells[i] for cells in columns.values())], group.runs))
        yield table

    def place(self, run: ReportedRun) -> str:
        """A run's folder below the common folder of all runs; for points of a sweep only the number, the table has the rest."""
        folders = [str(run.folder.absolute().parent) for run in self.reported.runs]
        below = run.folder.absolute().relative_to(os.path.commonpath(folders))
        return "/".join(re.sub(r"^(\d+)_.*", r"\1", part) for part in below.parts)

    # The pictures.

    def choose_pictures(self) -> Iterator[ShownPicture]:
        """A picture of the best and of the worst run by each of the main scores."""
        titles: dict[Path, tuple[ReportedRun, list[str]]] = {}
        for runs, name, kind in (
            (self.tokenizers, "psnr", "reconstructions"),
            (self.tokenizers, self.first_measured(*self.reconstruction[1:]), "reconstructions"),
            (self.priors, self.score_of_samples(), "samples"),
        ):
            with_picture = [Group({}, [run]) for run in runs if find_picture(run, kind)]
            parts = comparable_parts(with_picture, name) if name else []
            if name is None or not parts:
                continue
            order = best_first(parts[0].points, name)
            chosen = {"best ": order[0], "worst ": order[-1]} if len(order) > 1 else {"": order[0]}
            for word, point in chosen.items():
                file = find_picture(point.runs[0], kind)
                assert file is not None
                reason = f"{word}{score_info(name).label} {format_mean(name, point.means[name])}"
                titles.setdefault(file, (point.runs[0], []))[1].append(reason)
        for file, (run, reasons) in titles.items():
            title = f"{self.name_run(run)}: {' and '.join(reasons)}"
            yield ShownPicture(title, run, file, (run.tokenizer or run).shown)

    def first_measured(self, *names: str) -> str | None:
        """The first of these scores that was measured."""
        return next((name for name in names if self.main_part(name)), None)

    def score_of_samples(self) -> str | None:
        """The score that ranks priors; nats per token only if all learned codes of the same shape."""
        gfid = self.first_measured(*(name for _, name in self.of_both_stages))
        if gfid is None and self.ranks_groups("nats_per_token"):
            return "nats_per_token"
        return gfid

    def ranks_groups(self, name: str) -> bool:
        """Whether a better score is a better configuration: nats of codes of different shapes say nothing about each other."""
        shapes = {(g.settings.get("K"), g.settings.get("grid")) for g in self.of_priors}
        return name != "nats_per_token" or len(shapes) == 1

    def name_run(self, run: ReportedRun) -> str:
        """The configuration of a run, and its seed."""
        group = next(group for group in (*self.of_tokenizers, *self.of_priors) if run in group.runs)
        return f"{group.name}, seed {run.seed}"

    # What is missing.

    def suggest_runs(self) -> Iterator[str]:
        """For everything that a report can show and this one can't: what to run."""
        drawn = {chart.name for section in self.sections for chart in section.charts}
        if any(len(group.runs) == 1 for group in (*self.of_tokenizers, *self.of_priors)):
            yield "Intervals need at least two seeds per configuration: train.py -m ... seed=0,1,2"
        if self.tokenizers:
            yield from self.suggest_for_tokenizers(drawn)
        else:
            yield "Rate-distortion curves need tokenizers: add their folders to runs="
        if not self.priors:
            yield "The quality of samples, and how it depends on the tokenizer, needs priors: train.py -m experiment=pipeline"
        elif not any(self.main_part(f"{TOKENIZERS}{x}", y) for x, y in self.of_both_stages):
            yield "Reconstructions against samples need both stages evaluated: train.py stage=evaluate ckpt=<run folder> for each"
        shown = (*self.reconstruction, *self.generation)
        if any(SCORES[name].frechet and self.main_part(name) for name in shown):
            yield "Distances relative to real images need new evaluations of all runs: train.py stage=evaluate ckpt=<run>"
        if not any(name.startswith("learning-") for name in drawn):
            yield "Learning curves come from CSV logs: train.py ... logger=csv"

    def suggest_for_tokenizers(self, drawn: set[str]) -> Iterator[str]:
        """What to run for the missing charts of tokenizers; `drawn` are the names of those that exist."""
        if len(self.of_tokenizers) == 1:
            yield "Curves need at least two configurations: train.py -m stage=vqgan quantizer.K=128,512"
        measured = {name for run in self.tokenizers for name in run.figures}
        if not measured & {"rfid", "rfid_proxy"}:
            ckpt = self.tokenizers[0].folder
            command = f"train.py stage=evaluate {format_word('ckpt', ckpt)}"
            yield f"stage=evaluate measures rFID, or its proxy: {command}"
        if not any(run.references for run in self.tokenizers):
            yield "The curves of classical VQ and JPEG come with evaluations of tokenizers: train.py stage=evaluate ckpt=<run>"
        grids = suggest_grids(self.tokenizers[0].config.get("data"))
        if grids and not any(name.startswith("map-psnr-grid-K") for name in drawn):
            yield f"A map of grid by K needs at least two of each: train.py -m stage=vqgan model.grid={grids} quantizer.K=128,512"
        if not any(name.startswith("map-psnr-K-") for name in drawn):
            yield "A map of K by width needs at least two of each: train.py -m stage=vqgan quantizer.K=64,128 quantizer.dim=64,128"


def suggest_grids(data: Any) -> str:
    """Two grids to sweep, as the command line has them; for rectangles two that fit the sides in the settings of the images, and
    empty if there are none."""
    size = data.get("image_size") if isinstance(data, dict) else None
    if not isinstance(size, list) or len(size) != 2 or size[0] == size[1]:
        return "4,8"
    fs = [f for f in (16, 8, 4, 2) if size[0] % f == size[1] % f == 0][:2]
    return ",".join(f"[{size[0] // f},{size[1] // f}]" for f in fs) if len(fs) == 2 else ""


def compare_winner(part: ComparablePart, top: Point, name: str, rate: str | None) -> str:
    """The end of a sentence on the best point: its lead over the next one, or over one that it can't be told apart from.

    Of the latter it names the one with the fewest bits, or without `rate` the one with the best score.
    """
    better = score_info(name).better
    leads: list[tuple[Point, Difference]] = []
    for point in best_first(part.points, name):
        lead = compare_groups(top.group, point.group, name, part.provenance[name])
        if point is not top and lead is not None and lead.mean.half is not None:
            leads.append((point, lead))
    if not leads:
        return ""
    uncertain = [
        (point, lead)
        for point, lead in leads
        if better * lead.mean.mean <= lead.mean.half  # type: ignore[operator]
    ]
    if rate:
        uncertain.sort(key=lambda pair: pair[0].means[rate].mean)
    point, lead = (uncertain or leads)[0]
    ahead = Mean(better * lead.mean.mean, lead.mean.half, lead.mean.n)
    how = "paired by seed, " if lead.paired else "without common seeds, "
    if not uncertain:
        return f"; {how}{format_mean(name, ahead)} ahead of {point.group.name}"
    others = ""
    if len(uncertain) > 1:
        others = f", as is that over {format_count(len(uncertain) - 1, 'other')}"
    return (
        f"; {how}the lead over {point.group.name} ({format_mean(name, ahead)}) is uncertain{others}"
    )


def tokenizer_key(group: Group) -> str:
    """A text that is equal for priors on tokenizers of one configuration."""
    settings = flatten_run(group.runs[0]).items()
    return provenance_key({key: v for key, v in settings if key.startswith(TOKENIZERS)})


def describe_lead(part: ComparablePart, one: Point, other: Point, name: str) -> str:
    """The score of a point and of another, and whether the lead of the first is certain."""
    label = score_info(name).label
    values = f"{label} {format_mean(name, one.means[name])} against {format_mean(name, other.means[name])}"
    lead = compare_groups(one.group, other.group, name, part.provenance[name])
    if lead is None or lead.mean.half is None:
        return values
    how = "paired by seed" if lead.paired else "without common seeds"
    ahead = score_info(name).better * lead.mean.mean
    verdict = "" if ahead > lead.mean.half else ", uncertain"
    return f"{values}; {how}{verdict}"


def usable_names(run: ReportedRun) -> list[str]:
    """The scores that reports show of a run of this stage."""
    return [name for name, score in SCORES.items() if score.in_tables and run.stage in score.stages]


def explain_absence(run: ReportedRun, name: str) -> str | None:
    """Why a training run has no figure of this name, if it says so or if it is no number; None if there is a figure."""
    if name in run.figures:
        return None
    value = run.metrics.get(name)
    if isinstance(value, float):  # an infinity or a NaN, which earlier versions wrote
        return explain_non_finite(value)
    reasons = run.metrics.get("absent")
    return reasons.get(name) if isinstance(reasons, dict) else None


def find_picture(run: ReportedRun, kind: str) -> Path | None:
    """A run's picture of that kind, preferably one of its evaluation."""
    return next((path for path in run.pictures if kind in path.name), None)


def format_count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def format_seeds(point: Point) -> str:
    n = len(set(map(seed_key, point.runs)))
    return f"{n} seeds" if n > 1 else "one seed, so no interval"


def format_provenance(part: ComparablePart, name: str) -> str:
    """How a score was measured, in one line."""
    words = [
        f"{key} {shorten(value)}"
        for key, value in part.provenance[name].items()
        if value not in (None, {})
    ]
    return ", ".join(words) or "no provenance"


def shorten(value: Any) -> str:
    """A value of a provenance: the content of a mapping, the first digits of a hash."""
    if isinstance(value, dict):
        words = [f"{key} {shorten(item)}" for key, item in value.items() if item is not None]
        return f"({', '.join(words)})"
    text = str(value)
    return text[:12] + "…" if len(text) > 40 and " " not in text else text


def usual_provenance(grouped: Sequence[Group], of_tokenizers: Sequence[str]) -> dict[str, str]:
    """The scores that a table has columns for, for priors also some of their tokenizers, each with the provenance that most of
    its runs have."""
    names = [name for name, score in SCORES.items() if score.in_tables and name != "K"]
    names += [f"{TOKENIZERS}{name}" for name in of_tokenizers]
    usual = {}
    for name in names:
        parts = comparable_parts(grouped, name)
        if parts:
            usual[name] = provenance_key(parts[0].provenance[name])
    return usual


def score_cells(group: Group, usual: dict[str, str]) -> list[Cell]:
    """A group's cells in the columns of scores."""
    return [
        mean_cell(name, comparable_parts([group], name), provenance)
        for name, provenance in usual.items()
    ]


def file_cell(value: Any) -> Cell:
    """A figure of files; empty if it is none."""
    return (
        Cell(f"{value:,g}" if value < 1000 else f"{value:,.0f}", value)
        if is_figure(value)
        else Cell("")
    )


def setting_cell(key: str, value: Any) -> Cell:
    if value is None:
        return Cell("–")
    text = format_setting(key, value) if key == "grid" else format_choice(value)
    return Cell(text, float(value) if is_figure(value) else format_choice(value))


def mean_cell(name: str, parts: list[ComparablePart], usual: str) -> Cell:
    """A score in a table, marked with a dagger if it was measured differently from most of its column."""
    if not parts:
        return Cell("–")
    keys = [provenance_key(part.provenance[name]) for part in parts]
    i = keys.index(usual) if usual in keys else 0
    mean = parts[i].points[0].means[name]
    dagger = "" if keys[i] == usual else DAGGER
    return Cell(mean.text(score_info(name).decimals) + dagger, mean.mean)


def difference_cells(grouped: Sequence[Group], name: str, part: ComparablePart) -> list[Cell]:
    """Each group's difference from the best of a score, paired by seed."""
    best = best_first(part.points, name)[0].group
    cells = []
    for group in grouped:
        difference = compare_groups(group, best, name, part.provenance[name])
        if group is best:
            cells.append(Cell("best", 0.0))
        elif difference is None or not difference.paired:
            cells.append(Cell("–"))
        else:
            mean = difference.mean
            sign = "+" if mean.mean > 0 else ""
            cells.append(Cell(sign + mean.text(score_info(name).decimals), mean.mean))
    return cells


def column_head(name: str, kind: str, about: Mapping[str, Any]) -> list[str]:
    """Label and unit of a score's column, by the provenance of most of its runs; the bits of priors are likelihoods, not the rate
    of codes."""
    score = score_info(name, about)
    if name.startswith(TOKENIZERS):
        return [f"Tokenizer's {score.label}", score.unit]
    return (
        ["Likelihood", "bits/image"]
        if (name, kind) == (RATE, "priors")
        else [score.label, score.unit]
    )
