"""The charts of a report, drawn by matplotlib: as pictures, and as SVG that follows the page's colours and tells its points."""

import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from evaluation.report.groups import (
    SCORES,
    ComparablePart,
    Group,
    Point,
    Score,
    choice,
    ordered,
    rank,
    setting,
)
from evaluation.report.read import command, curve, is_number

INK, MUTED, LINE, PAPER = "#1c2127", "#5f6874", "#dfe3e8", "#fffffe"

COLOURS = (
    "#0b6fb3",
    "#c8500a",
    "#00875a",
    "#a8488a",
    "#a97800",
    "#3f8fae",
    "#6b6b6b",
)  # after Okabe & Ito 2008, all dark enough on white

VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    c: f"--c{i}" for i, c in enumerate(COLOURS)
}

MARKS = "osD^vPX"

SHADES = LinearSegmentedColormap.from_list("shades", ["#e8f1f8", "#7fb2d6", "#0b4f85"])

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "codegrid",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
}

WIDE, HIGH = 5.2, 3.9  # inches; at 9 points it can be read at a phone's width

MOST_BANDS, MOST_STEPS, MOST_FACETS = 8, 120, 4


@dataclass
class Chart:
    """A figure with its words."""

    name: str  # of its file
    title: str
    caption: str
    figure: Figure
    tips: list[tuple[str, list[str]]] = field(
        default_factory=list
    )  # of each marked point: what it says, and the ids of its runs

    def mark(self, text: str, point: Point) -> str:
        """The id of a point's mark in the drawing."""
        self.tips.append((text, [run.id for run in point.runs]))
        return f"tip-{len(self.tips) - 1}"

    def png(self, file: Path) -> None:
        self.figure.savefig(file, dpi=170, facecolor="white")

    def svg(self) -> str:
        """The drawing for the page: ids of its own, colours that the page sets, a title on every point."""
        file = io.StringIO()
        self.figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(
            r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL
        )  # a style in a page's SVG is the whole page's
        text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var({variable})")

        def titled(found: re.Match[str]) -> str:
            says, runs = self.tips[int(found[1])]
            return f'{found[0][:-1]} class="point" data-runs="{html.escape(" ".join(runs))}"><title>{html.escape(says)}</title>'

        text = re.sub(rf'<g id="{self.name}-tip-(\d+)">', titled, text)
        view = re.search(r'viewBox="([^"]+)"', text)
        assert view is not None
        head = f'<svg viewBox="{view[1]}" role="group" aria-label="{html.escape(self.title)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        return head + text[text.index(">") + 1 :]


def style() -> AbstractContextManager[None]:
    """Inside, figures are drawn and saved as a report's, whatever the user's own settings are."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def canvas(rows: int = 1, high: float = HIGH, wide: float = WIDE) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(wide, high), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, squeeze=False).flat)


def settle(figure: Any) -> None:
    """Lay a figure out for good: labels don't move its axes, and saving does not do it again."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


class ChartLabels:
    """Words beside points, each at the first of a few places where it is in nobody's way; without one it is left out."""

    def __init__(self, axes: Axes) -> None:
        self.axes, self.taken = axes, list[Any]()

    def keep_clear(self, xs: Sequence[float], ys: Sequence[float], radius: float = 2.5) -> None:
        """Of a line through these points, in data."""
        at, r = (
            self.axes.transData.transform(np.column_stack([xs, ys])),
            radius * self.axes.figure.dpi / 72,
        )
        for (x0, y0), (x1, y1) in itertools.pairwise([*at, at[-1]]):
            for x, y in np.linspace(
                (x0, y0), (x1, y1), 2 + int(max(abs(x1 - x0), abs(y1 - y0)) / (2 * r))
            ):
                self.taken.append((x - r, y - r, x + r, y + r))

    def put(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = MUTED,
        size: float = 7.5,
        weight: str = "normal",
        reach: int = 3,
    ) -> bool:
        """Whether there was room within `reach`; far from its point a label may seem to be another's."""
        figure, frame = self.axes.figure, self.axes.get_window_extent()
        near = [(7, 0, "left", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top"), (-7, 0, "right", "center"),
                (6, 5, "left", "bottom"), (-6, 5, "right", "bottom"), (6, -5, "left", "top"), (-6, -5, "right", "top")]  # fmt: skip
        for dx, dy, ha, va in [
            (times * dx, times * dy, ha, va)
            for times in range(1, reach + 1)
            for dx, dy, ha, va in near
        ]:
            note = self.axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                color=colour,
                fontsize=size,
                fontweight=weight,
            )
            box = note.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
            edges = (box.x0, box.y0, box.x1, box.y1)
            inside = (
                edges[0] >= frame.x0 + 3
                and edges[2] <= figure.bbox.x1 - 2
                and edges[1] >= frame.y0
                and edges[3] <= frame.y1
            )
            if inside and not any(crossing(edges, other) for other in self.taken):
                self.taken.append(edges)
                return True
            note.remove()
        return False


def crossing(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plain(value: float, _: Any = None) -> str:
    """A tick as people write numbers: 1,024 and 0.25, never 10^3."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:g}"


def log_ticks(axis: Any, values: Sequence[float], most: int = 7) -> None:
    """A logarithmic axis with ticks at values that occur, or at powers of two where these are too many or too close."""
    ticks = sorted(set(values))
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    if len(ticks) > most or any(
        math.log(b / a) < 0.11 * span for a, b in itertools.pairwise(ticks)
    ):
        low, high = math.floor(math.log2(ticks[0])), math.ceil(math.log2(ticks[-1]))
        ticks = [2.0**i for i in range(low, high + 1, max(1, (high - low) // most + 1))]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())


def legend_text(point: Point, *names: str) -> str:
    """What a point's tooltip says: its configuration, its scores, how many seeds, its first run's command."""
    lines = [point.group.name]
    for name in names:
        score = SCORES[name.removeprefix("tokenizer.")]
        lines.append(f"{score.label} {score.text(point.means[name])}")
    n = len(point.runs)
    lines.append(f"{n} seeds" if n > 1 else "1 seed, so no interval")
    return "\n".join([*lines, command(point.runs[0])])


class Looks:
    """How the points of a chart are told apart: by colour and mark the values of `key`, the grid where it differs, else another
    setting; by lines those that differ in K alone."""

    def __init__(self, grouped: Sequence[Group], but: Sequence[str] = ("K",)) -> None:
        keys = dict.fromkeys(key for group in grouped for key in group.settings if key not in but)
        differing = [
            key for key in keys if len({repr(group.settings.get(key)) for group in grouped}) > 1
        ]
        self.key = min(differing, key=lambda key: key != "grid", default=None)
        self.others = [key for key in differing if key != self.key]
        self.values = list(dict.fromkeys(self.value(group) for group in grouped))

    def value(self, group: Group) -> str:
        """What the colour stands for."""
        return setting(self.key, group.settings.get(self.key)) if self.key else ""

    def rest(self, group: Group) -> str:
        """What tells lines of one colour apart."""
        return ", ".join(setting(key, group.settings.get(key)) for key in self.others)

    def colour(self, group: Group) -> str:
        return COLOURS[self.values.index(self.value(group)) % len(COLOURS)]

    def mark(self, group: Group) -> str:
        return MARKS[self.values.index(self.value(group)) % len(MARKS)]

    def lines(self, points: Sequence[Point], x: str) -> list[list[Point]]:
        found: dict[tuple[str, str], list[Point]] = {}
        for point in sorted(
            points, key=lambda point: (rank(point.group.settings.get("K")), point.means[x].mean)
        ):
            found.setdefault((self.value(point.group), self.rest(point.group)), []).append(point)
        return list(found.values())


def scatter(
    chart: Chart, axes: Axes, points: Sequence[Point], looks: Looks, x: str, y: str
) -> None:
    """Points with their intervals, on lines by K; the halo of each, which one can touch, tells it."""
    for line in looks.lines(points, x):
        at = [[point.means[name].mean for point in line] for name in (x, y)]
        axes.plot(*at, color=looks.colour(line[0].group), linewidth=1.3, zorder=2)
    for point in points:
        colour, at_x, at_y = looks.colour(point.group), point.means[x], point.means[y]
        bars: dict[str, Any] = {
            "color": colour,
            "elinewidth": 0.9,
            "capsize": 2,
            "linestyle": "none",
            "alpha": 0.75,
            "zorder": 3,
        }
        axes.errorbar(at_x.mean, at_y.mean, at_y.half, at_x.half, **bars)
        look: dict[str, Any] = {
            "color": colour,
            "markersize": 5.5,
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.8,
            "zorder": 4,
        }
        axes.plot(at_x.mean, at_y.mean, looks.mark(point.group), **look)
        touched = chart.mark(legend_text(point, x, y), point)
        axes.plot(
            at_x.mean,
            at_y.mean,
            "o",
            color=colour,
            markersize=15,
            alpha=0.01,
            gid=touched,
            zorder=5,
        )


def name_points(
    axes: Axes, points: Sequence[Point], looks: Looks, x: str, y: str, K: bool = True
) -> ChartLabels:
    """Write beside lines what they are: the colour's name once, what tells lines of a colour apart, the first and the last K."""
    settle(axes.figure)
    labels, lines = ChartLabels(axes), looks.lines(points, x)
    longest = {
        looks.value(line[0].group): line for line in sorted(lines, key=len)
    }  # of each colour
    for line in lines:
        labels.keep_clear([p.means[x].mean for p in line], [p.means[y].mean for p in line])
        for p in line:
            for name, other in ((x, y), (y, x)):
                ends = {name: p.means[name].ends, other: (p.means[other].mean,) * 2}
                labels.keep_clear(ends[x], ends[y])

    def beside(line: Sequence[Point], text: str, *look: Any) -> None:
        """Where there is room along a line, at its first points rather."""
        any(labels.put(p.means[x].mean, p.means[y].mean, text, *look) for p in line)

    for value, line in longest.items() if looks.key else ():
        beside(line[::-1], value, looks.colour(line[0].group), 9, "bold")
    for line in lines if len(longest) < len(lines) <= 3 * len(longest) else ():
        n = len(line) // 2
        beside([*line[n:], *line[:n]], looks.rest(line[0].group), looks.colour(line[0].group))
    said = set[str]()
    for line in longest.values() if K else ():
        for end in (line[0], line[-1]):
            text = f"K={end.group.settings.get('K')}"
            if (
                "K" in end.group.settings
                and (where := f"{text} at {end.means[x].mean:.3g}") not in said
            ):
                labels.put(end.means[x].mean, end.means[y].mean, text, reach=1)
                said.add(where)
    return labels


def codecs(references: Sequence[dict[str, Any]], score: str) -> dict[str, dict[float, float]]:
    """Of each codec its best score at each rate."""
    curves: dict[str, dict[float, float]] = {}
    for reference in references:
        if is_number(reference.get("bits_per_image")) and is_number(reference.get(score)):
            at, bits, found = (
                curves.setdefault(str(reference.get("codec")), {}),
                float(reference["bits_per_image"]),
                reference[score],
            )
            at[bits] = max(found, at.get(bits, -math.inf))
    return curves


def curves_of_rate(
    name: str, part: ComparablePart, rate: str, score: str, curves: dict[str, dict[float, float]]
) -> Chart:
    """Bits per image against a score, with the classical codecs' own curves."""
    about = SCORES[score]
    figure, [axes] = canvas()
    chart = Chart(name, f"{about.label} against rate", "", figure)
    looks = Looks([point.group for point in part.points])
    axes.set_xscale("log")
    for i, codec in enumerate(sorted(curves)):
        line = sorted(curves[codec].items())
        axes.plot(
            *zip(*line, strict=True),
            color=MUTED,
            linestyle=("--", ":", "-.")[i % 3],
            linewidth=1.2,
            marker=".",
            markersize=4,
            zorder=1,
        )
    scatter(chart, axes, part.points, looks, rate, score)
    rates = [point.means[rate].mean for point in part.points] + [
        bits for at in curves.values() for bits in at
    ]
    room = max((max(rates) / min(rates)) ** 0.09, 1.1)  # where all have one rate, too
    log_ticks(axes.xaxis, rates)
    axes.margins(y=0.12)
    axes.set_xlim(min(rates) / room, max(rates) * room**2.4)  # room for names
    axes.grid(axis="y")
    axes.set_xlabel("Bits per image, all codes alike (log scale)")
    axes.set_ylabel(about.axis)
    labels = name_points(axes, part.points, looks, rate, score)
    for at in curves.values():
        labels.keep_clear(sorted(at), [at[bits] for bits in sorted(at)])
    for codec, at in curves.items():
        labels.put(max(at), at[max(at)], codec, MUTED, 8.5)
    beside = (
        f" Grey: {' and '.join(sorted(curves))} on the same images, the best setting at each rate."
        if curves
        else ""
    )
    chart.caption = f"{'Higher' if about.better > 0 else 'Lower'} is better; bars are 95% intervals over seeds.{beside}"
    return chart


def heat_map(name: str, part: ComparablePart, score: str, across: str, down: str) -> Chart | None:
    """A score by two settings, a cell for each pair, one map for each choice of what else was swept; None where that is no grid."""
    about = SCORES[score]
    keys = dict.fromkeys(
        key for point in part.points for key in point.group.settings if key not in (across, down)
    )
    others = [
        key
        for key in keys
        if len({repr(point.group.settings.get(key)) for point in part.points}) > 1
    ]
    facets: dict[str, list[Point]] = {}
    for point in part.points:
        if None not in (point.group.setting(across), point.group.setting(down)):
            title = ", ".join(setting(key, point.group.settings.get(key)) for key in others)
            facets.setdefault(title, []).append(point)
    facets = {title: cells for title, cells in facets.items() if len(cells) > 2}
    shown = sorted(facets.items(), key=lambda item: -len(item[1]))[:MOST_FACETS]
    columns, rows = (
        {value for _, cells in shown for p in cells if (value := p.group.setting(key)) is not None}
        for key in (across, down)
    )
    if len(columns) < 2 or len(rows) < 2:
        return None
    xs, ys = (
        sorted(values, key=lambda value: (isinstance(value, str), value))
        for values in (columns, rows)
    )
    high = len(shown) * (0.75 + 0.52 * len(ys)) + 0.35
    wide = max(WIDE, 1.0 + 0.78 * len(xs))
    figure, all_axes = canvas(len(shown), high, wide)
    chart = Chart(name, f"{about.label} by {word(down)} and {word(across)}", "", figure)
    means = [point.means[score].mean for _, cells in shown for point in cells]
    low, most = min(means), max(means)
    for axes, (title, cells) in zip(all_axes, shown, strict=True):
        top = ordered(cells, score)[0] if about.better else None
        for point in sorted(cells, key=lambda point: point is top):
            x, y = xs.index(point.group.setting(across)), ys.index(point.group.setting(down))
            found = point.means[score]
            share = (found.mean - low) / (most - low) if most > low else 0.5
            shade = SHADES(1 - share if about.better < 0 else share)
            edge: dict[str, Any] = (
                {"edgecolor": INK, "linewidth": 2.0}
                if point is top
                else {"edgecolor": PAPER, "linewidth": 1.5}
            )
            axes.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5),
                    1,
                    1,
                    facecolor=shade,
                    **edge,
                    gid=chart.mark(legend_text(point, score), point),
                )
            )
            dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.55
            ink = "#fefefe" if dark else "#15191e"  # on the cell's own shade, so not the page's
            up = 0.13 if found.half is not None else 0
            axes.text(
                x,
                y + up,
                f"{found.mean:.{about.decimals}f}",
                ha="center",
                va="center",
                color=ink,
                fontsize=9,
                clip_on=True,
            )
            if found.half is not None:
                axes.text(
                    x,
                    y - 0.22,
                    f"± {found.half:.{about.decimals}f}",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=7.2,
                )
        axes.set_xlim(-0.5, len(xs) - 0.5)
        axes.set_ylim(-0.5, len(ys) - 0.5)
        axes.set_xticks(range(len(xs)), [choice(x) for x in xs])
        axes.set_yticks(
            range(len(ys)), [setting("grid", y) if down == "grid" else choice(y) for y in ys]
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel(word(down).capitalize())
        axes.set_title(title, fontsize=9, loc="left")
    all_axes[-1].set_xlabel("K, codes in the codebook" if across == "K" else word(across))
    settle(figure)
    left_out = (
        f" {len(facets) - len(shown)} more combinations are in the table."
        if len(facets) > len(shown)
        else ""
    )
    unit = f" in {about.unit}" if about.unit else ""
    outlined = ", the best outlined" if about.better else ""
    darker = "higher" if about.better >= 0 else "better"
    chart.caption = f"{about.label}{unit}: mean over seeds and 95% interval{outlined}; darker is {darker}.{left_out}"
    return chart


def word(key: str) -> str:
    """What an axis calls a setting."""
    names = {"quantizer.dim": "width of a code", "model.width": "width of the model"}
    return names.get(key.removeprefix("tokenizer."), key)


def use_of_codes(name: str, part: ComparablePart) -> Chart:
    """Perplexity against K; on the diagonal all codes are used alike."""
    figure, [axes] = canvas()
    chart = Chart(name, "Perplexity against K", "", figure)
    looks = Looks([point.group for point in part.points])
    Ks = [point.means["K"].mean for point in part.points]
    ends = (
        min(*Ks, *(point.means["perplexity"].mean for point in part.points)) * 0.8,
        max(Ks) * 1.25,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(ends, ends, color=MUTED, linestyle="--", linewidth=1, zorder=1)
    scatter(chart, axes, part.points, looks, "K", "perplexity")
    log_ticks(axes.xaxis, Ks)
    log_ticks(
        axes.yaxis,
        [2.0**i for i in range(math.ceil(math.log2(ends[0])), int(math.log2(ends[1])) + 1)],
    )
    axes.set_xlim(min(Ks) / 1.35, max(Ks) * 1.35)
    axes.set_ylim(max(ends[0] / 1.1, 0.5), ends[1] * 1.2)
    axes.grid()
    axes.set_xlabel("K, codes in the codebook (log scale)")
    axes.set_ylabel("Perplexity, codes (log scale)")
    labels = name_points(axes, part.points, looks, "K", "perplexity", K=False)
    labels.keep_clear(ends, ends)
    middle = math.sqrt(min(Ks) * max(Ks))
    labels.put(middle, middle, "perplexity = K", MUTED, 8)
    chart.caption = (
        "On the dashed line every code is used equally often; how far below it a point lies is what "
        "the codebook wastes."
    )
    return chart


def against(name: str, part: ComparablePart, x: str, y: str) -> Chart:
    """One score against another, the tokenizer's against its prior's."""
    of, to = SCORES[x.removeprefix("tokenizer.")], SCORES[y]
    figure, [axes] = canvas()
    chart = Chart(name, f"{of.label} of the tokenizer against {to.label}", "", figure)
    looks = Looks([point.group for point in part.points])
    scatter(chart, axes, part.points, looks, x, y)
    axes.margins(0.12)
    axes.grid()
    axes.set_xlabel(f"{of.axis} of reconstructions")
    axes.set_ylabel(f"{to.axis} of samples")
    name_points(axes, part.points, looks, x, y)
    chart.caption = (
        "Lower is better on both axes; the tokenizer furthest left is not always the one whose codes "
        "are easiest to learn."
    )
    return chart


def learning_curves(name: str, grouped: Sequence[Group], series: str, about: Score) -> Chart | None:
    """A validation score over training steps: each configuration's mean, and the range of its seeds; None where no run has it."""
    figure, [axes] = canvas()
    chart = Chart(name, f"{about.label} while training", "", figure)
    looks = Looks(grouped, but=())
    drawn: list[tuple[Group, np.ndarray, np.ndarray]] = []
    for group in grouped:
        curves = [
            np.array(found) for run in group.runs if len(found := curve(run.folder, series)) > 1
        ]
        if not curves:
            continue
        first, last = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
        steps = np.unique(np.concatenate([c[:, 0] for c in curves]))
        steps = steps[(steps >= first) & (steps <= last)]
        if len(steps) < 2:
            continue
        if len(steps) > MOST_STEPS:
            steps = steps[np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)]
        drawn.append((group, steps, np.stack([np.interp(steps, c[:, 0], c[:, 1]) for c in curves])))
    if not drawn:
        return None
    banded = len(drawn) <= MOST_BANDS
    for group, steps, values in drawn:
        colour, point = looks.colour(group), Point(group, group.runs, {})
        last = f"{values[:, -1].mean():.{about.decimals}f} {about.unit}".rstrip()
        text = f"{group.name}\nat step {steps[-1]:,.0f}: {about.label} {last}"
        axes.plot(
            steps,
            values.mean(0),
            color=colour,
            linewidth=1.4 if banded else 0.9,
            alpha=1 if banded else 0.75,
        )
        axes.plot(
            steps,
            values.mean(0),
            color=colour,
            linewidth=9,
            alpha=0.01,
            gid=chart.mark(text, point),
            zorder=5,
        )
        if banded and len(values) > 1:
            axes.fill_between(
                steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0
            )
    finite = np.concatenate([values[:, len(values[0]) // 5 :].ravel() for _, _, values in drawn])
    low, high = float(finite.min()), float(finite.max())
    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.12 * (high - low or 1))
    axes.margins(x=0.02)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.grid(axis="y")
    axes.set_xlabel("Training step")
    axes.set_ylabel(about.axis)
    settle(figure)
    labels, sign = ChartLabels(axes), about.better or 1
    for value in looks.values if looks.key else ():
        of = [
            (float(steps[-1]), float(values[:, -1].mean()), group)
            for group, steps, values in drawn
            if looks.value(group) == value
        ]
        for x, y, group in sorted(of, key=lambda each: -sign * each[1])[:1]:
            labels.put(x, y, value, looks.colour(group), 9, "bold")
    bands = (
        "bands are the range of their seeds"
        if banded
        else f"bands are left out above {MOST_BANDS} lines"
    )
    n = f"{len(drawn)} configurations" if len(drawn) > 1 else "one configuration"
    chart.caption = f"On the validation images; means over the seeds of {n}, {bands}. The first steps may lie outside the frame."
    return chart
