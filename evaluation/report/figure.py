"""Figures of a report: as pictures, and as SVG that follows the page's colours and describes its points."""

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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from codegrid.evaluation.report.groups import Point

INK = "#1c2127"
MUTED = "#5f6874"
LINE = "#dfe3e8"
PAPER = "#fffffe"

# After Okabe & Ito 2008, all of them dark enough on white.
COLOURS = ("#0b6fb3", "#c8500a", "#00875a", "#a8488a", "#a97800", "#3f8fae", "#6b6b6b")

CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    colour: f"--c{i}" for i, colour in enumerate(COLOURS)
}

HEAT_SHADES = LinearSegmentedColormap.from_list("shades", ["#e8f1f8", "#7fb2d6", "#0b4f85"])

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

# Inches; at 9 points the text is legible at a phone's width.
FIGURE_WIDTH = 5.2
FIGURE_HEIGHT = 3.9


@dataclass
class Chart:
    """A figure with its texts; `tips` are a text and the ids of the runs for every marked point."""

    name: str  # of its file
    title: str
    caption: str
    figure: Figure
    tips: list[tuple[str, list[str]]] = field(default_factory=list)

    def mark(self, text: str, point: Point) -> str:
        """Register a point's tooltip; returns the id for its mark in the drawing."""
        self.tips.append((text, [run.id for run in point.runs]))
        return f"tip-{len(self.tips) - 1}"

    def png(self, file: Path) -> None:
        self.figure.savefig(file, dpi=170, facecolor="white")

    def svg(self) -> str:
        """The drawing for the page: unique ids, colours by CSS variables, a title on every marked point."""
        file = io.StringIO()
        self.figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
        text = file.getvalue()
        text = text[text.index("<svg") :]
        # A style element in an inline SVG would apply to the whole page.
        text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        for colour, variable in CSS_VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        text = re.sub(rf'<g id="{self.name}-tip-(\d+)">', self._add_title, text)
        view = re.search(r'viewBox="([^"]+)"', text)
        assert view is not None
        head = (
            f'<svg viewBox="{view[1]}" role="group" aria-label="{html.escape(self.title)}" '
            'xmlns:xlink="http://www.w3.org/1999/xlink">'
        )
        return head + text[text.index(">") + 1 :]

    def _add_title(self, group: re.Match[str]) -> str:
        """The opening tag of a marked point's group with its runs and its tooltip."""
        text, runs = self.tips[int(group[1])]
        ids = html.escape(" ".join(runs))
        return f'{group[0][:-1]} class="point" data-runs="{ids}"><title>{html.escape(text)}</title>'


def report_style() -> AbstractContextManager[None]:
    """Inside, figures are drawn and saved in the report's style, whatever the user's own settings are."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def make_figure(
    rows: int = 1, height: float = FIGURE_HEIGHT, width: float = FIGURE_WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its axes, one below the other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, squeeze=False).flat)


def fix_layout(figure: Any) -> None:
    """Lay the figure out once and for all: labels don't move its axes, and saving doesn't repeat the layout."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def format_tick(value: float, _: Any = None) -> str:
    """A tick label such as 1,024 or 0.25, never 10^3."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:g}"


def set_log_ticks(axis: Any, values: Sequence[float], max_ticks: int = 7) -> None:
    """Ticks of a logarithmic axis at the values that occur, or at powers of two if these are too many or too close."""
    ticks = sorted(set(values))
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    too_close = any(math.log(b / a) < 0.11 * span for a, b in itertools.pairwise(ticks))
    if len(ticks) > max_ticks or too_close:
        low = math.floor(math.log2(ticks[0]))
        high = math.ceil(math.log2(ticks[-1]))
        ticks = [2.0**i for i in range(low, high + 1, max(1, (high - low) // max_ticks + 1))]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(format_tick))
    axis.set_minor_locator(NullLocator())
