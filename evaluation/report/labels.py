"""Text labels beside the points of a chart."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from codegrid.evaluation.report.figure import MUTED

# Places around a point, in points of 1/72 inch, with the alignment of the text there.
PLACES = (
    (7, 0, "left", "center"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (-7, 0, "right", "center"),
    (6, 5, "left", "bottom"),
    (-6, 5, "right", "bottom"),
    (6, -5, "left", "top"),
    (-6, -5, "right", "top"),
)

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


class ChartLabels:
    """Labels beside points, each at the first of a few places where it covers nothing; if there is none it is left out.

    Libraries such as adjustText move labels until they no longer overlap, but keep all of them, far from their points if they
    must, and know no alternatives along a line; a label that seems to belong to another point is worse than none.
    """

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.taken: list[Box] = []

    def keep_clear(self, xs: Sequence[float], ys: Sequence[float], radius: float = 2.5) -> None:
        """Keep labels away from a line through these points, given in data coordinates."""
        path = self.axes.transData.transform(np.column_stack([xs, ys]))
        r = radius * self.axes.figure.dpi / 72
        for (x0, y0), (x1, y1) in itertools.pairwise([*path, path[-1]]):
            steps = 2 + int(max(abs(x1 - x0), abs(y1 - y0)) / (2 * r))
            for x, y in np.linspace((x0, y0), (x1, y1), steps):
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
        """Write a label beside a point; returns whether there was room within `reach` times the usual distance."""
        for times in range(1, reach + 1):
            for dx, dy, ha, va in PLACES:
                note = self.axes.annotate(
                    text,
                    (x, y),
                    (times * dx, times * dy),
                    textcoords="offset points",
                    ha=ha,
                    va=va,
                    color=colour,
                    fontsize=size,
                    fontweight=weight,
                )
                box = self._box_of(note)
                if self._is_inside(box) and not any(overlap(box, other) for other in self.taken):
                    self.taken.append(box)
                    return True
                note.remove()
        return False

    def _box_of(self, note: Any) -> Box:
        canvas: Any = self.axes.figure.canvas
        box = note.get_window_extent(canvas.get_renderer())
        return box.x0, box.y0, box.x1, box.y1

    def _is_inside(self, box: Box) -> bool:
        """Whether a box lies in the axes, or to the right of them but still in the figure."""
        frame = self.axes.get_window_extent()
        left, bottom, right, top = box
        fits_across = left >= frame.x0 + 3 and right <= self.axes.figure.bbox.x1 - 2
        return bool(fits_across and bottom >= frame.y0 and top <= frame.y1)


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
