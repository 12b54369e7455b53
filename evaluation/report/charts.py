"""The charts of a report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from codegrid.engine.figures import is_figure
from codegrid.evaluation.report.figure import (
    COLOURS,
    FIGURE_WIDTH,
    HEAT_SHADES,
    INK,
    MUTED,
    PAPER,
    Chart,
    fix_layout,
    format_tick,
    make_figure,
    set_log_ticks,
)
from codegrid.evaluation.report.groups import (
    ComparablePart,
    Group,
    Point,
    best_first,
    format_choice,
    format_mean,
    format_setting,
    score_info,
    sort_key,
)
from codegrid.evaluation.report.labels import ChartLabels
from codegrid.evaluation.report.read import read_curve, rerun_command
from codegrid.evaluation.scores import Score

MARKERS = "osD^vPX"
RATE_AXIS = "Bits per image, codes of equal length (log scale)"
LIKELIHOOD_AXIS = "Bits per image under the prior (log scale)"

MAX_BANDS = 8  # learning curves with the range of their seeds
MAX_CURVE_STEPS = 120
MAX_FACETS = 4


def describe_point(point: Point, *names: str) -> str:
    """A point's tooltip: its configuration, its scores, the number of seeds, the command of its first run."""
    lines = [point.group.name]
    lines += [f"{score_info(name).label} {format_mean(name, point.means[name])}" for name in names]
    n = len(point.runs)
    lines.append(f"{n} seeds" if n > 1 else "1 seed, so no interval")
    return "\n".join([*lines, rerun_command(point.runs[0])])


class PointStyles:
    """How the points of a chart are distinguished.

    Colour and marker stand for the values of `key`: the grid if it varies, otherwise another setting. Lines connect points
    that differ in K only (in the settings `along`).
    """

    def __init__(self, grouped: Sequence[Group], along: Sequence[str] = ("K",)) -> None:
        keys = dict.fromkeys(key for group in grouped for key in group.settings if key not in along)
        varied = [
            key for key in keys if len({repr(group.settings.get(key)) for group in grouped}) > 1
        ]
        self.key = min(varied, key=lambda key: key != "grid", default=None)
        self.others = [key for key in varied if key != self.key]
        self.values = list(dict.fromkeys(self.value(group) for group in grouped))

    def value(self, group: Group) -> str:
        """What the colour stands for."""
        return format_setting(self.key, group.settings.get(self.key)) if self.key else ""

    def rest(self, group: Group) -> str:
        """What distinguishes lines of one colour."""
        return ", ".join(format_setting(key, group.settings.get(key)) for key in self.others)

    def colour(self, group: Group) -> str:
        return COLOURS[self.values.index(self.value(group)) % len(COLOURS)]

    def marker(self, group: Group) -> str:
        return MARKERS[self.values.index(self.value(group)) % len(MARKERS)]

    def lines(self, points: Sequence[Point], x: str) -> list[list[Point]]:
        """The points of each line, by K and then by the score `x`."""
        lines: dict[tuple[str, str], list[Point]] = {}
        for point in sorted(
            points, key=lambda p: (sort_key(p.group.settings.get("K")), p.means[x].mean)
        ):
            lines.setdefault((self.value(point.group), self.rest(point.group)), []).append(point)
        return list(lines.values())


def draw_points(
    chart: Chart, axes: Axes, points: Sequence[Point], styles: PointStyles, x: str, y: str
) -> None:
    """Points with their intervals, on lines by K; an invisible halo around each carries its tooltip."""
    for line in styles.lines(points, x):
        path = [[point.means[name].mean for point in line] for name in (x, y)]
        axes.plot(*path, color=styles.colour(line[0].group), linewidth=1.3, zorder=2)
    for point in points:
        colour = styles.colour(point.group)
        across = point.means[x]
        up = point.means[y]
        axes.errorbar(
            across.mean,
            up.mean,
            up.half,
            across.half,
            color=colour,
            elinewidth=0.9,
            capsize=2,
            linestyle="none",
            alpha=0.75,
            zorder=3,
        )
        axes.plot(
            across.mean,
            up.mean,
            styles.marker(point.group),
            color=colour,
            markersize=5.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            zorder=4,
        )
        axes.plot(
            across.mean,
            up.mean,
            "o",
            color=colour,
            markersize=15,
            alpha=0.01,
            gid=chart.mark(describe_point(point, x, y), point),
            zorder=5,
        )


def label_lines(
    axes: Axes,
    points: Sequence[Point],
    styles: PointStyles,
    x: str,
    y: str,
    with_K: bool = True,
    avoid: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
) -> ChartLabels:
    """Label the lines: each colour once, what distinguishes lines of one colour, and the first and the last K.

    `avoid` are further lines in the chart, each by its xs and ys.
    """
    fix_layout(axes.figure)
    labels = ChartLabels(axes)
    for xs, ys in avoid:
        labels.keep_clear(xs, ys)
    lines = styles.lines(points, x)
    keep_points_clear(labels, lines, x, y)

    def put_along(line: Sequence[Point], text: str, *style: Any) -> None:
        """At the first point of the line with room."""
        any(labels.put(p.means[x].mean, p.means[y].mean, text, *style) for p in line)

    longest = {styles.value(line[0].group): line for line in sorted(lines, key=len)}  # per colour
    for value, line in longest.items() if styles.key else ():
        put_along(line[::-1], value, styles.colour(line[0].group), 9, "bold")
    for line in lines if len(longest) < len(lines) <= 3 * len(longest) else ():
        middle = len(line) // 2
        from_middle = [*line[middle:], *line[:middle]]
        put_along(from_middle, styles.rest(line[0].group), styles.colour(line[0].group))
    if with_K:
        label_line_ends(labels, list(longest.values()), x, y)
    return labels


def keep_points_clear(
    labels: ChartLabels, lines: Sequence[Sequence[Point]], x: str, y: str
) -> None:
    """Keep labels away from lines and from the bars of intervals."""
    for line in lines:
        labels.keep_clear([p.means[x].mean for p in line], [p.means[y].mean for p in line])
        for p in line:
            for name, other in ((x, y), (y, x)):
                ends = {name: p.means[name].ends, other: (p.means[other].mean,) * 2}
                labels.keep_clear(ends[x], ends[y])


def label_line_ends(labels: ChartLabels, lines: Sequence[Sequence[Point]], x: str, y: str) -> None:
    """Label the first and the last point of each line with its K, once per place on the axis."""
    labelled = set[str]()
    for line in lines:
        for end in (line[0], line[-1]):
            if "K" not in end.group.settings:
                continue
            text = f"K={end.group.settings['K']}"
            place = f"{text} at {end.means[x].mean:.3g}"
            if place not in labelled:
                labels.put(end.means[x].mean, end.means[y].mean, text, reach=1)
                labelled.add(place)


def codec_curves(references: Sequence[dict[str, Any]], score: str) -> dict[str, dict[float, float]]:
    """The best score of each codec at each rate: codec -> bits per image -> score."""
    curves: dict[str, dict[float, float]] = {}
    for reference in references:
        if is_figure(reference.get("bits_per_image")) and is_figure(reference.get(score)):
            curve = curves.setdefault(str(reference.get("codec")), {})
            bits = float(reference["bits_per_image"])
            curve[bits] = max(reference[score], curve.get(bits, -math.inf))
    return curves


def draw_rate_curves(
    name: str,
    part: ComparablePart,
    names: tuple[str, str],
    curves: dict[str, dict[float, float]],
    axis: str = RATE_AXIS,
) -> Chart:
    """A score against bits per image, by the `names` of the bits and of the score, with the `curves` of classical codecs."""
    rate, score = names
    about = score_info(score, part.provenance[score])
    figure, [axes] = make_figure()
    bits = "rate" if axis == RATE_AXIS else "bits under the prior"
    chart = Chart(name, f"{about.label} against {bits}", "", figure)
    styles = PointStyles([point.group for point in part.points])
    axes.set_xscale("log")
    draw_codecs(axes, curves)
    draw_points(chart, axes, part.points, styles, rate, score)
    rates = [point.means[rate].mean for point in part.points]
    rates += [bits for curve in curves.values() for bits in curve]
    margin = max((max(rates) / min(rates)) ** 0.09, 1.1)  # also if all rates are equal
    set_log_ticks(axes.xaxis, rates)
    axes.margins(y=0.12)
    axes.set_xlim(min(rates) / margin, max(rates) * margin**2.4)  # room for labels on the right
    axes.grid(axis="y")
    axes.set_xlabel(axis)
    axes.set_ylabel(about.axis)
    paths = [(sorted(curve), [curve[b] for b in sorted(curve)]) for curve in curves.values()]
    labels = label_lines(axes, part.points, styles, rate, score, avoid=paths)
    for codec, curve in curves.items():
        labels.put(max(curve), curve[max(curve)], codec, MUTED, 8.5)
    better = "Higher" if about.better > 0 else "Lower"
    real = " 1 is as far from the images as other real images are." if "_ratio" in score else ""
    chart.caption = f"{better} is better; bars are 95% intervals over seeds.{real}"
    if part.provenance[rate].get("exact") is False:
        chart.caption += " The bits are upper bounds."
    if any(point.means[score].half for point in part.points):
        chart.caption += " The table of differences has intervals within seeds."
    chart.caption += describe_codecs(curves)
    return chart


def draw_codecs(axes: Axes, curves: Mapping[str, Mapping[float, float]]) -> None:
    """The grey lines of codecs: codec -> bits per image -> score."""
    for i, codec in enumerate(sorted(curves)):
        axes.plot(
            *zip(*sorted(curves[codec].items()), strict=True),
            color=MUTED,
            linestyle=("--", ":", "-.")[i % 3],
            linewidth=1.2,
            marker=".",
            markersize=4,
            zorder=1,
        )


def describe_codecs(curves: Mapping[str, Mapping[float, float]]) -> str:
    """The sentence of a caption on the grey lines; empty if there are none."""
    codecs = " and ".join(sorted(curves))
    sentence = f" Grey: {codecs} on the same images, with the best setting at each rate."
    return sentence if curves else ""


def draw_heat_map(
    name: str, part: ComparablePart, score: str, across: str, down: str
) -> Chart | None:
    """A score by two settings, with one map for each combination of the other swept settings.

    Returns None if the points span less than two values of either setting.
    """
    facets = split_into_facets(part.points, across, down)
    shown = sorted(facets.items(), key=lambda item: -len(item[1]))[:MAX_FACETS]
    xs, ys = (
        sorted(
            {p.group.setting(key) for _, cells in shown for p in cells},
            key=sort_key,
        )
        for key in (across, down)
    )
    if len(xs) < 2 or len(ys) < 2:
        return None
    about = score_info(score, part.provenance[score])
    height = len(shown) * (0.75 + 0.52 * len(ys)) + 0.35
    figure, all_axes = make_figure(len(shown), height, max(FIGURE_WIDTH, 1.0 + 0.78 * len(xs)))
    title = f"{about.label} by {setting_label(down)} and {setting_label(across)}"
    chart = Chart(name, title, "", figure)
    means = [point.means[score].mean for _, cells in shown for point in cells]
    scale = (min(means), max(means))
    for axes, (facet, cells) in zip(all_axes, shown, strict=True):
        best = best_first(cells, score)[0] if about.better else None
        for point in sorted(cells, key=lambda point: point is best):
            place = (xs.index(point.group.setting(across)), ys.index(point.group.setting(down)))
            draw_cell(chart, axes, point, score, place, scale, point is best)
        axes.set_xlim(-0.5, len(xs) - 0.5)
        axes.set_ylim(-0.5, len(ys) - 0.5)
        axes.set_xticks(range(len(xs)), [format_choice(x) for x in xs])
        rows = [format_setting("grid", y) if down == "grid" else format_choice(y) for y in ys]
        axes.set_yticks(range(len(ys)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel(setting_label(down).capitalize())
        axes.set_title(facet, fontsize=9, loc="left")
    all_axes[-1].set_xlabel("K, codes in the codebook" if across == "K" else setting_label(across))
    fix_layout(figure)
    chart.caption = heat_map_caption(about, len(facets) - len(shown))
    return chart


def split_into_facets(points: Sequence[Point], across: str, down: str) -> dict[str, list[Point]]:
    """The points that have both settings, by the combination of all other settings that vary; more than two points each."""
    keys = dict.fromkeys(
        key for point in points for key in point.group.settings if key not in (across, down)
    )
    varied = [
        key for key in keys if len({repr(point.group.settings.get(key)) for point in points}) > 1
    ]
    facets: dict[str, list[Point]] = {}
    for point in points:
        if None not in (point.group.setting(across), point.group.setting(down)):
            settings = point.group.settings
            title = ", ".join(format_setting(key, settings.get(key)) for key in varied)
            facets.setdefault(title, []).append(point)
    return {title: cells for title, cells in facets.items() if len(cells) > 2}


def draw_cell(
    chart: Chart,
    axes: Axes,
    point: Point,
    score: str,
    place: tuple[int, int],
    scale: tuple[float, float],
    is_best: bool,
) -> None:
    """A cell of a heat map: its shade on the scale from the lowest to the highest mean, its mean and its interval."""
    about = score_info(score)
    mean = point.means[score]
    x, y = place
    low, high = scale
    share = (mean.mean - low) / (high - low) if high > low else 0.5
    shade = HEAT_SHADES(1 - share if about.better < 0 else share)
    cell = Rectangle(
        (x - 0.5, y - 0.5),
        1,
        1,
        facecolor=shade,
        edgecolor=INK if is_best else PAPER,
        linewidth=2.0 if is_best else 1.5,
        gid=chart.mark(describe_point(point, score), point),
    )
    axes.add_patch(cell)
    is_dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.55
    ink = "#fefefe" if is_dark else "#15191e"  # fixed: the cell's shade doesn't follow the page
    text: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
    lift = 0.13 if mean.half is not None else 0
    value = f"{mean.mean:.{about.decimals}f}"
    axes.text(x, y + lift, value, fontsize=9, clip_on=True, **text)
    if mean.half is not None:
        axes.text(x, y - 0.22, f"± {mean.half:.{about.decimals}f}", fontsize=7.2, **text)


def heat_map_caption(about: Score, left_out: int) -> str:
    unit = f" in {about.unit}" if about.unit else ""
    outlined = ", the best outlined" if about.better else ""
    darker = "higher" if about.better >= 0 else "better"
    caption = (
        f"{about.label}{unit}: mean over seeds and 95% interval{outlined}; darker is {darker}."
    )
    if left_out > 0:
        caption += f" {left_out} more combinations are in the table."
    return caption


def setting_label(key: str) -> str:
    """What an axis calls a setting."""
    names = {"quantizer.dim": "width of a code", "model.width": "width of the model"}
    return names.get(key.removeprefix("tokenizer."), key)


def draw_code_use(name: str, part: ComparablePart) -> Chart:
    """Perplexity against K; on the diagonal all codes are equally frequent."""
    figure, [axes] = make_figure()
    chart = Chart(name, "Perplexity against K", "", figure)
    styles = PointStyles([point.group for point in part.points])
    Ks = [point.means["K"].mean for point in part.points]
    lowest = min(*Ks, *(point.means["perplexity"].mean for point in part.points))
    ends = (lowest * 0.8, max(Ks) * 1.25)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(ends, ends, color=MUTED, linestyle="--", linewidth=1, zorder=1)
    draw_points(chart, axes, part.points, styles, "K", "perplexity")
    set_log_ticks(axes.xaxis, Ks)
    powers = range(math.ceil(math.log2(ends[0])), int(math.log2(ends[1])) + 1)
    set_log_ticks(axes.yaxis, [2.0**i for i in powers])
    axes.set_xlim(min(Ks) / 1.35, max(Ks) * 1.35)
    axes.set_ylim(max(ends[0] / 1.1, 0.5), ends[1] * 1.2)
    axes.grid()
    axes.set_xlabel("K, codes in the codebook (log scale)")
    axes.set_ylabel("Perplexity, codes (log scale)")
    diagonal = (ends, ends)
    labels = label_lines(
        axes, part.points, styles, "K", "perplexity", with_K=False, avoid=[diagonal]
    )
    middle = math.sqrt(min(Ks) * max(Ks))
    labels.put(middle, middle, "perplexity = K", MUTED, 8)
    chart.caption = (
        "On the dashed line all codes are equally frequent; the further a point lies below it, the "
        "more of the codebook is wasted."
    )
    return chart


def draw_score_pair(name: str, part: ComparablePart, x: str, y: str) -> Chart:
    """A score of tokenizers against a score of their priors."""
    of_tokenizer = score_info(x)
    of_prior = score_info(y)
    figure, [axes] = make_figure()
    title = f"{of_tokenizer.label} of the tokenizer against {of_prior.label}"
    chart = Chart(name, title, "", figure)
    styles = PointStyles([point.group for point in part.points])
    draw_points(chart, axes, part.points, styles, x, y)
    axes.margins(0.12)
    axes.grid()
    axes.set_xlabel(f"{of_tokenizer.axis} of reconstructions")
    axes.set_ylabel(f"{of_prior.axis} of samples")
    label_lines(axes, part.points, styles, x, y)
    chart.caption = (
        "Lower is better on both axes; the tokenizer furthest to the left is not always the one whose "
        "codes are easiest to learn."
    )
    return chart


Curve = tuple[Group, np.ndarray, np.ndarray]  # steps (n,) and values (seeds, n) of a configuration


def draw_learning_curves(
    name: str, grouped: Sequence[Group], series: str, about: Score
) -> Chart | None:
    """A validation score over training steps: the mean of each configuration and the range of its seeds.

    Returns None if no run has the series.
    """
    curves = [curve for group in grouped if (curve := read_group_curve(group, series))]
    if not curves:
        return None
    figure, [axes] = make_figure()
    chart = Chart(name, f"{about.label} during training", "", figure)
    styles = PointStyles(grouped, along=())
    has_bands = len(curves) <= MAX_BANDS
    for group, steps, values in curves:
        colour = styles.colour(group)
        mean = values.mean(0)
        last = f"{values[:, -1].mean():.{about.decimals}f} {about.unit}".rstrip()
        text = f"{group.name}\nat step {steps[-1]:,.0f}: {about.label} {last}"
        halo = chart.mark(text, Point(group, group.runs, {}))
        width, alpha = (1.4, 1.0) if has_bands else (0.9, 0.75)
        axes.plot(steps, mean, color=colour, linewidth=width, alpha=alpha)
        axes.plot(steps, mean, color=colour, linewidth=9, alpha=0.01, gid=halo, zorder=5)
        if has_bands and len(values) > 1:
            band = (values.min(0), values.max(0))
            axes.fill_between(steps, *band, color=colour, alpha=0.18, linewidth=0)
    # The first steps may lie outside the frame: they would flatten the rest.
    later = np.concatenate([values[:, len(values[0]) // 5 :].ravel() for _, _, values in curves])
    low, high = float(later.min()), float(later.max())
    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.12 * (high - low or 1))
    axes.margins(x=0.02)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
    axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.grid(axis="y")
    axes.set_xlabel("Training step")
    axes.set_ylabel(about.axis)
    label_best_curves(axes, curves, styles, about)
    bands = "bands are the range of their seeds"
    if not has_bands:
        bands = f"bands are left out above {MAX_BANDS} lines"
    n = f"{len(curves)} configurations" if len(curves) > 1 else "one configuration"
    chart.caption = f"On the validation images; means over the seeds of {n}, {bands}. The first steps may lie outside the frame."
    return chart


def read_group_curve(group: Group, series: str) -> Curve | None:
    """A series of all runs of a group at the same steps, those that all of them cover; None if there are no two validations."""
    curves = [np.array(read_curve(run.folder, series)) for run in group.runs]
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return None
    first = max(curve[0, 0] for curve in curves)
    last = min(curve[-1, 0] for curve in curves)
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    # A validation after the last update is logged once more at the end, one step later.
    if len(steps) < 2 or steps[-1] - steps[0] < 2:
        return None
    if len(steps) > MAX_CURVE_STEPS:
        steps = steps[np.linspace(0, len(steps) - 1, MAX_CURVE_STEPS).round().astype(int)]
    values = np.stack([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])
    return group, steps, values


def label_best_curves(
    axes: Axes, curves: Sequence[Curve], styles: PointStyles, about: Score
) -> None:
    """Label each colour at the end of its best curve."""
    fix_layout(axes.figure)
    labels = ChartLabels(axes)
    sign = about.better or 1
    for value in styles.values if styles.key else ():
        ends = [
            (float(steps[-1]), float(values[:, -1].mean()), group)
            for group, steps, values in curves
            if styles.value(group) == value
        ]
        if ends:
            x, y, group = max(ends, key=lambda end: sign * end[1])
            labels.put(x, y, value, styles.colour(group), 9, "bold")
