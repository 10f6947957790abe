"""Charts as inline SVG: pure functions from numbers to markup. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from mmclip_dist.evaluate.report.numbers import is_known, power_of_ten, significant

Point = tuple[float, float]
"""(step, value), both finite."""

WIDTH, HEIGHT = 360.0, 212.0  # of the view box; close to pixels on screen, so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 44.0, 350.0, 34.0, 176.0  # the plotting area inside it

_DOTS = 60  # points of a stretch: up to this many, each gets a mark; longer noisy stretches get a smooth line over the raw one
_DRAWN = 300  # points of a line at most: one a pixel of the plotting area
_TABLED = 40  # rows of a table at most
_ROOM_FOR_LABEL = 62.0  # view box units that the name of a phase takes


@dataclass(frozen=True)
class LineChart:
    """One quantity over steps. steps: ends of the axis; boundary: last step of the warm-up; from_zero: y starts at 0;
    noisy: long stretches are smoothed.

    points may hold None and nan, which leave a gap.
    """

    title: str
    unit: str
    points: tuple[tuple[float, float | None], ...]
    steps: tuple[float, float]
    boundary: float | None = None
    from_zero: bool = False
    noisy: bool = False

    @property
    def known(self) -> list[Point]:
        return [(step, value) for step, value in self.points if value is not None and is_known(value)]

    @property
    def stretches(self) -> list[list[Point]]:
        """The known points, cut at gaps and at the boundary, where a loss may jump."""
        found: list[list[Point]] = [[]]
        for step, value in self.points:
            if self.boundary is not None and found[-1] and found[-1][-1][0] <= self.boundary < step:
                found.append([])
            if value is not None and is_known(value):
                found[-1].append((step, value))
            else:
                found.append([])
        return [stretch for stretch in found if stretch]

    @property
    def window(self) -> int:
        """Rows in the longest mean of the smooth lines; 0: none is smoothed."""
        return max((window(stretch) for stretch in self.stretches), default=0) if self.noisy else 0


@dataclass(frozen=True)
class Scale:
    """A straight map from values to view box units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values (steps of 1, 2 or 5 times a power of ten) in [low, high], about `wanted` of them. low < high."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def value_range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """Ends of a y axis that holds all values; never empty."""
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        return 0.0, high * 1.08 or 1.0
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def window(stretch: Sequence[Point]) -> int:
    """Points in one mean of a smooth line (odd); 0 if the stretch is too short to smooth."""
    return len(stretch) // 10 | 1 if len(stretch) > _DOTS else 0


def smooth(points: Sequence[Point], size: int) -> list[Point]:
    """Centred mean over `size` points (fewer at the ends): the line neither lags nor gets shorter."""
    half = size // 2
    means = []
    for number, (step, _) in enumerate(points):
        values = [value for _, value in points[max(0, number - half) : number + half + 1]]
        means.append((step, sum(values) / len(values)))
    return means


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: the minimum and maximum of each stretch, so that no spike is lost. limit >= 4."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 2) / (limit // 2 - 1))
    kept = [points[0]]
    for start in range(1, len(points) - 1, size):
        stretch = points[start : min(start + size, len(points) - 1)]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def line_chart(chart: LineChart) -> Markup:
    """The SVG of a chart with at least one known point."""
    known = chart.known
    y_low, y_high = value_range([value for _, value in known], chart.from_zero)
    across, down = Scale(*chart.steps, LEFT, RIGHT), Scale(y_low, y_high, BOTTOM, TOP)
    parts = [
        _boundary(chart.boundary, chart.steps, across),
        _value_axis(y_low, y_high, down, chart.unit),
        _step_axis(chart.steps, across),
    ]
    for stretch in chart.stretches:
        parts += _drawn(stretch, chart.noisy, across, down)
    return Markup('<svg class="chart" role="img" viewBox="0 0 {:.0f} {:.0f}"><title>{}</title>{}</svg>').format(
        WIDTH, HEIGHT, description(chart), Markup("").join(parts)
    )


def _drawn(stretch: Sequence[Point], noisy: bool, across: Scale, down: Scale) -> list[Markup]:
    if len(stretch) <= _DOTS:
        return [_path(stretch, across, down, "line"), *(_dot(point, across, down) for point in stretch)]
    if not noisy:
        return [_path(thin(stretch, _DRAWN), across, down, "line")]
    means = smooth(stretch, window(stretch))
    return [_path(thin(stretch, _DRAWN), across, down, "raw"), _path(thin(means, _DRAWN), across, down, "line")]


def description(chart: LineChart) -> str:
    """A sentence for those who cannot see the chart."""
    (first, before), (last, after) = chart.known[0], chart.known[-1]
    return (
        f"{chart.title} ({chart.unit}) over training steps: {significant(before)} at step {first:,.0f}, "
        f"{significant(after)} at step {last:,.0f}; the same figures are in the table below."
    )


def table_rows(chart: LineChart) -> list[tuple[str, str]]:
    """(step, value) texts. If there are many they are evenly spaced; the first and the last are always included."""
    points = chart.points
    every = max(1, math.ceil((len(points) - 1) / (_TABLED - 1)))
    rows = [*points[:-1:every], *points[-1:]]
    return [(f"{step:,.0f}", significant(value, 4)) for step, value in rows]


def _path(points: Sequence[Point], across: Scale, down: Scale, name: str) -> Markup:
    places = " ".join(f"{across(step):.1f},{down(value):.1f}" for step, value in points)
    return Markup('<polyline class="{}" points="{}"/>').format(name, places)


def _dot(point: Point, across: Scale, down: Scale) -> Markup:
    step, value = point
    return Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.4"><title>{}</title></circle>').format(
        across(step), down(value), f"step {step:,.0f}: {significant(value, 4)}"
    )


def _value_axis(low: float, high: float, down: Scale, unit: str) -> Markup:
    values = ticks(low, high)
    largest = max((abs(value) for value in values), default=0.0)
    exponent = 0 if largest == 0 or 0.01 <= largest < 1e5 else math.floor(math.log10(largest))
    scaled = [value / 10.0**exponent for value in values]
    title = f"{unit}, × {power_of_ten(exponent)}" if exponent else unit
    lines = [
        Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, RIGHT, down(value), down(value)
        )
        + Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT - 6, down(value) + 4, label
        )
        for value, label in zip(values, tick_labels(scaled), strict=True)
    ]
    return Markup('<text class="unit" x="0" y="11">{}</text>').format(title) + Markup("").join(lines)


def tick_labels(values: Sequence[float]) -> list[str]:
    """Texts of the ticks, with as many decimals as their distance needs."""
    gap = min((abs(after - before) for before, after in pairwise(values)), default=0.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap else 2
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def _step_axis(steps: tuple[float, float], across: Scale) -> Markup:
    values = [value for value in ticks(*steps) if value == int(value)]
    labels = [step_label(value) for value in values]
    marks = [
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
            across(value), BOTTOM + 16, label
        )
        for value, label in zip(values, labels, strict=True)
    ]
    axis = Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        LEFT, RIGHT, BOTTOM, BOTTOM
    )
    name = Markup('<text class="unit" x="{:.1f}" y="{:.1f}" text-anchor="middle">step</text>').format(
        (LEFT + RIGHT) / 2, BOTTOM + 32
    )
    return axis + Markup("").join(marks) + name


def step_label(step: float) -> str:
    """150, 2,500, 20k, 1.5M."""
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 1e4 else f"{step:,.0f}"


def _boundary(boundary: float | None, steps: tuple[float, float], across: Scale) -> Markup:
    """Shade the warm-up's part of the axis, and name both phases if there is room."""
    if boundary is None or not steps[0] < boundary < steps[1]:
        return Markup("")
    x = across(boundary)
    shade = Markup('<rect class="phase" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        LEFT, TOP, x - LEFT, BOTTOM - TOP
    )
    line = Markup('<line class="boundary" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(x, x, TOP, BOTTOM)
    label = Markup('<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    names = []
    if x - LEFT > _ROOM_FOR_LABEL:
        names.append(label.format(x - 5, TOP - 5, "end", "warm-up"))
    if RIGHT - x > _ROOM_FOR_LABEL:
        names.append(label.format(x + 5, TOP - 5, "start", "MMCLIP"))
    return shade + line + Markup("").join(names)


def bar(
    share: float, label: str, *, reference: float | None = None, bounds: tuple[float, float] | None = None
) -> Markup:
    """A horizontal bar, as wide as its cell at 1. share, reference, bounds: in [0, 1]; label: its spoken text."""
    parts = [Markup('<rect class="bar" x="0" y="25%" height="50%" width="{:.2f}%"/>').format(100 * share)]
    if reference is not None:
        line = Markup('<line class="reference" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>')
        parts.append(line.format(100 * reference))
    if bounds is not None and all(is_known(bound) for bound in bounds):
        low, high = (100 * bound for bound in bounds)
        line = Markup('<line class="whisker" x1="{:.2f}%" x2="{:.2f}%" y1="{}%" y2="{}%"/>')
        parts += [line.format(low, high, 50, 50), line.format(low, low, 32, 68), line.format(high, high, 32, 68)]
    return Markup('<svg class="bars" role="img"><title>{}</title>{}</svg>').format(label, Markup("").join(parts))
