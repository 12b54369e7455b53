"""What a report says of its runs: the sentences at its head, its charts, its tables, and what is missing."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report import charts
from evaluation.report.charts import Chart
from evaluation.report.groups import (
    SCORES,
    ComparablePart,
    Group,
    Point,
    choice,
    find_varied,
    flat,
    groups,
    ordered,
    parts,
    seed_of,
    setting,
    short,
)
from evaluation.report.read import ReportedRun, ReportedRuns, is_number

RECONSTRUCTION, GENERATION = (
    ("psnr", "rfid", "rfid_proxy"),
    ("gfid", "gfid_proxy", "nats_per_token"),
)

RATE = "bits_per_image"

NEAR = 0.5  # dB below the best PSNR, and still worth a sentence where it takes fewer bits

MOST_PARTS = 3  # ways of measuring one score that get a chart each

DAGGER = "†"


@dataclass
class Section:
    """A heading and charts."""

    title: str
    charts: list[Chart]


@dataclass
class Cell:
    """What a table shows and what it is sorted by."""

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
class Shown:
    """A picture of a run, and why it is shown."""

    title: str
    run: ReportedRun
    file: Path


class Story:
    """All that a report says of what was found."""

    def __init__(self, found: ReportedRuns) -> None:
        self.found = found
        self.tokenizers, self.priors = (
            [run for run in found.runs if run.stage == stage] for stage in ("vqgan", "prior")
        )
        self.of_tokenizers, self.of_priors = groups(self.tokenizers), groups(self.priors)
        self.notes: list[str] = []  # of scores that can't be compared
        with charts.style():
            self.sections = [section for section in self.drawn() if section.charts]
        self.head, self.missing = list(self.sentences()), list(self.lacking())
        self.tables = list(self.tabled())
        self.shown = list(self.extremes())

    def grouped(self, name: str) -> list[Group]:
        """The groups that have this score: "tokenizer.rfid" and what only priors have are theirs."""
        return (
            self.of_priors
            if name.startswith("tokenizer.") or name in GENERATION
            else self.of_tokenizers
        )

    def main(self, *names: str) -> ComparablePart | None:
        """The largest set of points whose scores can be compared."""
        found = parts(self.grouped(names[-1]), *names)
        return found[0] if found else None

    # The head.

    def sentences(self) -> Iterator[str]:
        """What a reader wants to know first."""
        yield self.counted()
        for name in ("psnr", "rfid", "rfid_proxy"):
            if part := self.main(RATE, name):
                yield from self.winner(part, name, RATE)
        yield from self.gain()
        for name in ("gfid", "gfid_proxy"):
            if part := self.main(name):
                yield from self.winner(part, name, None)

    def counted(self) -> str:
        """How many runs of what."""
        said = []
        for runs, grouped, what in (
            (self.tokenizers, self.of_tokenizers, "tokenizer"),
            (self.priors, self.of_priors, "prior"),
        ):
            if runs:
                n = sorted({len(set(map(seed_of, group.runs))) for group in grouped})
                each = plural(n[0], "seed") if len(n) == 1 else f"{n[0]} to {n[-1]} seeds"
                said.append(
                    f"{plural(len(runs), what)} in {plural(len(grouped), 'configuration')} ({each} each)"
                )
        keys = find_varied(self.tokenizers) + [
            key
            for key in find_varied(self.priors)
            if key not in ("grid", "K") and not key.startswith("tokenizer.")
        ]
        values = [f"{short(key)} ({self.choices(key)})" for key in keys[:4]]
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        return (
            f"{' and '.join(said)}; what differs: {', '.join(values)}{more}."
            if keys
            else f"{' and '.join(said)}."
        )

    def choices(self, key: str) -> str:
        """The values of a swept key, in few words."""
        found = {
            repr(value): value
            for run in self.found.runs
            if (value := flat(run).get(key)) is not None
        }
        values = sorted(
            found.values(),
            key=lambda value: (not is_number(value), value if is_number(value) else str(value)),
        )
        words = [setting(key, value) if key == "grid" else choice(value) for value in values]
        return (
            ", ".join(words)
            if len(words) <= 6
            else f"{words[0]} to {words[-1]}, {len(words)} values"
        )

    def winner(self, part: ComparablePart, name: str, rate: str | None) -> Iterator[str]:
        """The best configuration of a score, who can't be told from it, and who comes near it for fewer bits."""
        score, top = SCORES[name], ordered(part.points, name)[0]
        if len(part.points) == 1:
            yield f"{score.label}: {score.text(top.means[name])} ({top.group.name}; {seeds(top)})."
            return
        at = f" at {top.means[rate].mean:,.0f} bits" if rate else ""
        low, high = top.means[name].ends
        close = [
            p
            for p in part.points
            if p is not top and top.means[name].half is not None and p.means[name].half is not None
        ]
        close = [p for p in close if p.means[name].ends[1] >= low and p.means[name].ends[0] <= high]
        but = ""
        if close:
            named = min(
                close,
                key=lambda p: p.means[rate].mean if rate else -score.better * p.means[name].mean,
            )
            others = f" and {plural(len(close) - 1, 'other')}" if len(close) > 1 else ""
            but = f"; the interval overlaps that of {named.group.name}{others}"
        yield f"Best {score.label}{at}: {top.group.name}, {score.text(top.means[name])} ({seeds(top)}){but}."
        if name == "psnr" and rate:
            near = [p for p in part.points if p.means[name].mean >= top.means[name].mean - NEAR]
            small = min(near, key=lambda p: (p.means[rate].mean, -p.means[name].mean))
            if small.means[rate].mean < top.means[rate].mean:
                less = top.means[name].mean - small.means[name].mean
                yield (
                    f"Within {NEAR:g} dB of it for the fewest bits: {small.group.name}, {score.text(small.means[name])} at "
                    f"{small.means[rate].mean:,.0f} bits ({less:.2f} dB less)."
                )

    def gain(self) -> Iterator[str]:
        """How far above classical vector quantization tokenizers are at their own rates, between whose settings lines are drawn."""
        part = self.main(RATE, "psnr")
        told = (
            charts.codecs(self.references(part.provenance["psnr"]), "psnr").get("classical VQ", {})
            if part
            else {}
        )
        bits = sorted(told)
        gains = {
            point.group.name: point.means["psnr"].mean
            - float(np.interp(np.log(rate), np.log(bits), [told[each] for each in bits]))
            for point in (part.points if part and bits else ())
            if bits[0] <= (rate := point.means[RATE].mean) <= bits[-1]
        }
        if gains:
            most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
            to = f" to {gains[least]:+.2f} dB ({least})" if most != least else ""
            yield f"PSNR against classical VQ at the same rate: {gains[most]:+.2f} dB ({most}){to}."

    # The charts.

    def drawn(self) -> Iterator[Section]:
        """All charts that the runs support."""
        rates = [
            self.apart(f"rate-{name}", (RATE, name), self.rate_chart)
            for name in ("psnr", "rfid", "rfid_proxy")
        ]
        yield Section("Rate and distortion", [chart for made in rates for chart in made])
        pairs = [("K", "grid"), ("quantizer.dim", "K"), ("model.width", "K")]
        maps = []
        for across, down in pairs:
            for name in (*RECONSTRUCTION, "perplexity", *GENERATION):
                prefix = "tokenizer." if name in GENERATION and "." in across else ""
                maps += self.apart(
                    f"map-{name}-{down}-{short(across)}",
                    (name,),
                    lambda called, part, a=prefix + across, d=down: charts.heat_map(
                        called, part, next(iter(part.provenance)), a, d
                    ),
                )
        yield Section("Which grid, which K, which width", maps)
        samples = [
            self.apart(f"rate-{name}", (f"tokenizer.{RATE}", name), self.rate_chart)
            for name in ("gfid", "gfid_proxy")
        ]
        samples += [
            self.apart(
                f"{x}-{y}",
                (f"tokenizer.{x}", y),
                lambda called, part: charts.against(called, part, *part.provenance),
            )
            for x, y in (("rfid", "gfid"), ("rfid_proxy", "gfid_proxy"))
        ]
        yield Section(
            "Good reconstructions, good samples", [chart for made in samples for chart in made]
        )
        use = self.apart("perplexity", ("K", "perplexity"), charts.use_of_codes)
        learning = [
            charts.learning_curves(f"learning-{name}", grouped, f"val/{name}", SCORES[name])
            for grouped, name in ((self.of_tokenizers, "psnr"), (self.of_priors, "nats_per_token"))
        ]
        yield Section(
            "The use of codes, and learning", [*use, *(chart for chart in learning if chart)]
        )

    def apart(self, called: str, names: Sequence[str], draw: Any) -> list[Chart]:
        """A chart for each way in which the scores were measured, never two on one axis; a note where there are several."""
        found = parts(self.grouped(names[-1]), *names)
        made = []
        for i, part in enumerate(found[:MOST_PARTS]):
            if len(part.points) < 2 and not (
                names[-1] == "psnr" and self.references(part.provenance["psnr"])
            ):
                continue  # a point alone is a sentence
            chart = draw(called if i == 0 else f"{called}-{i + 1}", part)
            if chart is not None:
                if len(found) > 1:
                    chart.caption += f" Measured: {how(part, names[-1])}."
                made.append(chart)
        if len(found) > 1 and made:
            label = SCORES[names[-1].removeprefix("tokenizer.")].label
            ways = "; ".join(
                f"{plural(sum(len(p.runs) for p in part.points), 'run')}: {how(part, names[-1])}"
                for part in found
            )
            note = f"{label} was measured in {len(found)} ways, which are never on one axis or in one mean ({ways})."
            if note not in self.notes:
                self.notes.append(note)
        return made

    def rate_chart(self, called: str, part: ComparablePart) -> Chart:
        rate, score = part.provenance
        return charts.curves_of_rate(
            called,
            part,
            rate,
            score,
            charts.codecs(self.references(part.provenance[score]), score),
        )

    def references(self, provenance: dict[str, Any]) -> list[dict[str, Any]]:
        """What classical codecs do with the images that a PSNR of this provenance is of."""
        alike = [
            run
            for run in self.tokenizers
            if key_of(run.provenance.get("psnr", {})) == key_of(provenance)
        ]
        return [reference for run in alike for reference in run.references]

    # The tables.

    def tabled(self) -> Iterator[StoryTable]:
        """Configurations with their means, then all runs; tokenizers before priors."""
        for grouped, what in ((self.of_tokenizers, "tokenizers"), (self.of_priors, "priors")):
            if not grouped:
                continue
            keys = list(dict.fromkeys(key for group in grouped for key in group.settings))
            names = [*SCORES, *(f"tokenizer.{name}" for name in RECONSTRUCTION if what == "priors")]
            usual = {
                name: key_of(found[0].provenance[name])
                for name in names
                if name != "K" and (found := parts(grouped, name))
            }
            heads = [[short(key), ""] for key in keys]
            scores = [
                [f"Tokenizer's {label}" if "." in name else label, unit]
                for name in usual
                for label, unit in [run_name(name, what)]
            ]
            means = StoryTable(f"configurations-{what}", f"Configurations: {what}", "Means over seeds ± half of the 95% interval.",
                          [*heads, ["Seeds", ""], *scores])  # fmt: skip
            each = StoryTable(f"runs-{what}", f"Runs: {what}", "A row opens the command behind it.",
                         [["Run", ""], *heads, ["Seed", ""], *scores])  # fmt: skip
            for group in grouped:
                settings = [setting_cell(key, group.settings.get(key)) for key in keys]
                figures = [mean_cell(name, parts([group], name), usual[name]) for name in usual]
                means.rows.append(
                    ([*settings, Cell(str(len(group.runs)), len(group.runs)), *figures], group.runs)
                )
                for run in group.runs:
                    figures = [
                        mean_cell(name, parts([Group(group.settings, [run])], name), usual[name])
                        for name in usual
                    ]
                    seed = Cell(choice(run.seed), run.seed if is_number(run.seed) else None)
                    each.rows.append(
                        ([Cell(self.place(run), self.place(run)), *settings, seed, *figures], [run])
                    )
            yield from (means, each)

    def place(self, run: ReportedRun) -> str:
        """A run's folder below what all runs have in common; of a sweep's points the number, for the table has the rest."""
        common = os.path.commonpath([str(run.folder.absolute().parent) for run in self.found.runs])
        below = run.folder.absolute().relative_to(common)
        return "/".join(re.sub(r"^(\d+)_.*", r"\1", part) for part in below.parts)

    # The pictures.

    def extremes(self) -> Iterator[Shown]:
        """The best and the worst run by the scores that are there, with a picture each."""
        rfid, gfid = (
            next((name for name in names if self.main(name)), None)
            for names in (("rfid", "rfid_proxy"), ("gfid", "gfid_proxy"))
        )
        if (
            gfid is None
            and len(
                {(group.settings.get("K"), group.settings.get("grid")) for group in self.of_priors}
            )
            == 1
        ):
            gfid = "nats_per_token"  # which say something of the same codes alone
        titles: dict[Path, tuple[ReportedRun, list[str]]] = {}
        for runs, name, kind in (
            (self.tokenizers, "psnr", "reconstructions"),
            (self.tokenizers, rfid, "reconstructions"),
            (self.priors, gfid, "samples"),
        ):
            found = (
                parts([Group({}, [run]) for run in runs if embed_picture(run, kind)], name)
                if name
                else []
            )
            if name is None or not found:
                continue
            order = ordered(found[0].points, name)
            for word, point in (
                {"best": order[0], "worst": order[-1]}.items()
                if len(order) > 1
                else [("", order[0])]
            ):
                file = embed_picture(point.runs[0], kind)
                assert file is not None
                said = (
                    f"{word} {SCORES[name].label} {SCORES[name].text(point.means[name])}".lstrip()
                )
                titles.setdefault(file, (point.runs[0], []))[1].append(said)
        for file, (run, told) in titles.items():
            yield Shown(f"{self.name_of(run)}: {' and '.join(told)}", run, file)

    def name_of(self, run: ReportedRun) -> str:
        """The configuration of a run, and its seed."""
        group = next(group for group in (*self.of_tokenizers, *self.of_priors) if run in group.runs)
        return f"{group.name}, seed {run.seed}"

    # What is missing.

    def lacking(self) -> Iterator[str]:
        """For everything that a report can show and this one can't: what to run."""
        drawn = {chart.name for section in self.sections for chart in section.charts}
        any_run = (self.tokenizers or self.priors)[0]
        if any(len(group.runs) == 1 for group in (*self.of_tokenizers, *self.of_priors)):
            yield "Intervals need at least two seeds of a configuration: train.py -m ... seed=0,1,2"
        if self.tokenizers and len(self.of_tokenizers) == 1:
            yield "Curves need at least two configurations: train.py -m stage=vqgan quantizer.K=128,512"
        if not self.tokenizers:
            yield "Rate-distortion curves need tokenizers: give runs= their folders too."
        elif not any(
            name in run.figures for run in self.tokenizers for name in ("rfid", "rfid_proxy")
        ):
            yield f"rFID, or its proxy, is what stage=evaluate measures: train.py stage=evaluate ckpt={any_run.folder}"
        if self.tokenizers and not any(run.references for run in self.tokenizers):
            yield "The curves of classical VQ and JPEG come with tokenizers' evaluations: train.py stage=evaluate ckpt=<run>"
        if self.tokenizers and not any(name.startswith("map-psnr-grid-K") for name in drawn):
            yield "A map of grid by K needs at least two of each: train.py -m stage=vqgan model.grid=4,8 quantizer.K=128,512"
        if self.tokenizers and not any(name.startswith("map-psnr-K-") for name in drawn):
            yield "A map of K by width needs at least two of each: train.py -m stage=vqgan quantizer.K=64,128 quantizer.dim=64,128"
        if not self.priors:
            yield "How good samples are, and how it goes with the tokenizer, needs priors: train.py -m experiment=pipeline"
        elif not any(
            self.main(f"tokenizer.{rfid}", gfid)
            for rfid, gfid in (("rfid", "gfid"), ("rfid_proxy", "gfid_proxy"))
        ):
            yield "Reconstructions against samples need both stages evaluated: train.py stage=evaluate ckpt=<run folder> for each"
        if not any(name.startswith("learning-") for name in drawn):
            yield "Learning curves come from CSV logs: train.py ... logger=csv"


def embed_picture(run: ReportedRun, kind: str) -> Path | None:
    """A run's picture of that kind, of an evaluation before its own."""
    return next((path for path in run.pictures if kind in path.name), None)


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def seeds(point: Point) -> str:
    n = len(set(map(seed_of, point.runs)))
    return f"{n} seeds" if n > 1 else "one seed, so no interval"


def key_of(provenance: dict[str, Any]) -> str:
    """Equal of equal dicts."""
    return json.dumps(provenance, sort_keys=True, default=str)


def how(part: ComparablePart, name: str) -> str:
    """How a score was measured, in one line."""
    told = part.provenance[name]
    return (
        ", ".join(f"{key} {brief(value)}" for key, value in told.items() if value not in (None, {}))
        or "not said"
    )


def brief(value: Any) -> str:
    """A value of a provenance: of a mapping what is in it, of a hash its first digits."""
    if isinstance(value, dict):
        return (
            "("
            + ", ".join(f"{key} {brief(each)}" for key, each in value.items() if each is not None)
            + ")"
        )
    text = str(value)
    return text[:12] + "…" if len(text) > 40 and " " not in text else text


def setting_cell(key: str, value: Any) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(
        setting(key, value) if key == "grid" else choice(value),
        float(value) if is_number(value) else choice(value),
    )


def mean_cell(name: str, found: list[ComparablePart], usual: str) -> Cell:
    """A score in a table, marked where it was measured otherwise than most of its column."""
    if not found:
        return Cell("–")
    part = next((part for part in found if key_of(part.provenance[name]) == usual), found[0])
    told, score = part.points[0].means[name], SCORES[name.removeprefix("tokenizer.")]
    return Cell(
        told.text(score.decimals) + (DAGGER if key_of(part.provenance[name]) != usual else ""),
        told.mean,
    )


def run_name(name: str, what: str) -> tuple[str, str]:
    """The head of a score's column; the bits of a prior are another thing than those of a tokenizer."""
    score = SCORES[name.removeprefix("tokenizer.")]
    return (
        ("Likelihood", "bits/image")
        if (name, what) == (RATE, "priors")
        else (score.label, score.unit)
    )
