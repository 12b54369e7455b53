"""Rate-distortion curves of single runs: tokenizers of nested codes, of which one serves many rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from codegrid.engine.figures import is_figure
from codegrid.evaluation.report.charts import (
    RATE_AXIS,
    PointStyles,
    codec_curves,
    describe_codecs,
    draw_codecs,
)
from codegrid.evaluation.report.figure import (
    FIGURE_HEIGHT,
    MUTED,
    PAPER,
    Chart,
    fix_layout,
    make_figure,
    report_style,
    set_log_ticks,
)
from codegrid.evaluation.report.groups import (
    ComparablePart,
    Group,
    Mean,
    Point,
    mean_over_seeds,
    score_info,
)
from codegrid.evaluation.report.labels import ChartLabels
from codegrid.evaluation.report.read import ReportedRun, rerun_command
from codegrid.evaluation.scores import CURVE_SCORES, USUAL_PIXELS, Score

CODEC_MARGIN = 4.0  # times the lowest and the highest rate, beyond which codecs are not drawn


@dataclass(frozen=True)
class RateCurve:
    """A score of one configuration at its rates: bits per image -> mean over seeds, the lowest rate first."""

    group: Group
    runs: Sequence[ReportedRun]
    means: Mapping[float, Mean]

    @classmethod
    def read(cls, point: Point, score: str) -> "RateCurve | None":
        """The curve of the runs of a point; None if none has one with this score."""
        values: dict[float, list[float]] = {}
        for run in point.runs:
            for bits, value in read_rates(run.rates, score).items():
                values.setdefault(bits, []).append(value)
        means = {bits: mean_over_seeds(values[bits]) for bits in sorted(values)}
        return cls(point.group, point.runs, means) if means else None


def read_rates(rows: Sequence[Mapping[str, Any]], score: str) -> dict[float, float]:
    """Bits per image -> a score, of the rows of metrics.json that have both."""
    return {
        float(row["bits_per_image"]): float(row[score])
        for row in rows
        if is_figure(row.get("bits_per_image")) and is_figure(row.get(score))
    }


def draw_run_rates(
    name: str, part: ComparablePart, score: str, references: Sequence[dict[str, Any]]
) -> Chart | None:
    """A score of nested codes against the rate, a line for each configuration; None if none has a curve."""
    curves = [curve for point in part.points if (curve := RateCurve.read(point, score))]
    if not curves:
        return None
    about = score_info(score, part.provenance[score])
    figure, [axes] = make_figure()
    chart = Chart(name, f"{about.label} of one run at many rates", "", figure)
    codecs = nearby_codecs(references, score, curves)
    draw_rate_axes(chart, axes, curves, about, codecs)
    better = "Higher" if about.better > 0 else "Lower"
    chart.caption = (
        f"{better} is better. Each line is one configuration of nested codes, decoded from the first of them; bars are 95% "
        f"intervals over seeds.{describe_codecs(codecs)}"
    )
    return chart


def draw_curve(
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Mapping[str, Any]],
    references: Sequence[dict[str, Any]],
    file: Path,
) -> Path:
    """Write the curve of one run as a picture: a panel for each score that the rows have, by its provenance."""
    scores = [score for score in CURVE_SCORES if read_rates(rows, score)]
    with report_style():
        figure, panels = make_figure(len(scores), 0.75 * FIGURE_HEIGHT * len(scores))
        chart = Chart(file.stem, "", "", figure)
        for score, axes in zip(scores, panels, strict=True):
            means = {b: mean_over_seeds([v]) for b, v in sorted(read_rates(rows, score).items())}
            curves = [RateCurve(Group({}), [], means)]
            codecs = nearby_codecs(references, score, curves)
            about = score_info(score, provenance.get(score, USUAL_PIXELS))
            draw_rate_axes(chart, axes, curves, about, codecs)
        file.parent.mkdir(parents=True, exist_ok=True)
        chart.png(file)
    return file


def nearby_codecs(
    references: Sequence[dict[str, Any]], score: str, curves: Sequence[RateCurve]
) -> dict[str, dict[float, float]]:
    """The curves of codecs as far as their rates are near those of the runs: they would stretch the axis."""
    rates = [bits for curve in curves for bits in curve.means]
    low, high = min(rates) / CODEC_MARGIN, max(rates) * CODEC_MARGIN
    near = {
        codec: {bits: value for bits, value in curve.items() if low <= bits <= high}
        for codec, curve in codec_curves(references, score).items()
    }
    return {codec: curve for codec, curve in near.items() if curve}


def draw_rate_axes(
    chart: Chart,
    axes: Axes,
    curves: Sequence[RateCurve],
    about: Score,
    codecs: Mapping[str, Mapping[float, float]],
) -> None:
    """Lines of a score against bits per image, with those of codecs in grey, and their labels."""
    styles = PointStyles([curve.group for curve in curves], along=())
    axes.set_xscale("log")
    draw_codecs(axes, codecs)
    for curve in curves:
        draw_rate_line(chart, axes, curve, styles, about)
    rates = [bits for curve in curves for bits in curve.means]
    rates += [bits for codec in codecs.values() for bits in codec]
    margin = max((max(rates) / min(rates)) ** 0.09, 1.1)
    set_log_ticks(axes.xaxis, rates)
    axes.margins(y=0.12)
    axes.set_xlim(min(rates) / margin, max(rates) * margin**2.4)  # room for labels on the right
    axes.grid(axis="y")
    axes.set_xlabel(RATE_AXIS)
    axes.set_ylabel(about.axis)
    fix_layout(axes.figure)
    label_rate_lines(axes, curves, styles, codecs)


def draw_rate_line(
    chart: Chart, axes: Axes, curve: RateCurve, styles: PointStyles, about: Score
) -> None:
    """The line of one configuration; an invisible halo around each point carries its tooltip."""
    colour = styles.colour(curve.group)
    means = list(curve.means.values())
    axes.errorbar(
        list(curve.means),
        [mean.mean for mean in means],
        [mean.half or 0.0 for mean in means],
        color=colour,
        linewidth=1.3,
        elinewidth=0.9,
        marker=styles.marker(curve.group),
        markersize=5.5,
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        zorder=3,
    )
    for bits, mean in curve.means.items():
        lines = [curve.group.name, f"{bits:,.4g} bits per image"]
        lines.append(f"{about.label} {mean.text(about.decimals)} {about.unit}".rstrip())
        lines += [rerun_command(run) for run in curve.runs[:1]]
        halo = chart.mark("\n".join(lines), Point(curve.group, list(curve.runs), {}))
        axes.plot(bits, mean.mean, "o", color=colour, markersize=15, alpha=0.01, gid=halo, zorder=5)


def label_rate_lines(
    axes: Axes,
    curves: Sequence[RateCurve],
    styles: PointStyles,
    codecs: Mapping[str, Mapping[float, float]],
) -> None:
    """Label each configuration and each codec at the highest of its rates with room."""
    labels = ChartLabels(axes)
    lines = [{bits: mean.mean for bits, mean in curve.means.items()} for curve in curves]
    for line in [*lines, *codecs.values()]:
        labels.keep_clear(sorted(line), [line[bits] for bits in sorted(line)])
    for curve, line in zip(curves, lines, strict=True) if styles.key else ():
        text, colour = curve.group.name, styles.colour(curve.group)
        any(labels.put(bits, line[bits], text, colour, 8) for bits in sorted(line, reverse=True))
    for codec, points in codecs.items():
        labels.put(max(points), points[max(points)], codec, MUTED, 8.5)
