"""Charts by Matplotlib, as inline SVG: text stays text, and colours are the page's own, in light and in dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from mmclip_dist.evaluate.report.numbers import is_known, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[tuple[float, float | None], ...]
SERIES = 6
"""Lines of one chart that have colours of their own: the style sheet's --s1 to --s6."""

_WIDTH, _HEIGHT = 360, 212  # of the view box; close to pixels on screen, so that text keeps its size
_DOTS = 60  # points of a stretch: up to this many, each gets a mark; longer noisy ones are smoothed, over the band they lie in
_BINS = 150  # of a band: its edges are the extremes of each bin, so that no spike is lost
_TABLED = 40  # rows of a table at most
_ROOM_FOR_LABEL = 0.2  # of the width, which the name of a phase takes

# Matplotlib draws in colours that stand for the style sheet's. No two are equal, none is used for anything else.
_INK = {
    name: f"#fe00{number:02x}"
    for number, name in enumerate(("ink", "muted", "grid", "soft", "chance", *(f"s{k + 1}" for k in range(SERIES))))
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: selectable, small, in the page's font
    "text.parse_math": False,  # names of classes and losses are not TeX
    "axes.unicode_minus": True, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.edgecolor": _INK["muted"], "axes.linewidth": 0.7, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "axes.labelcolor": _INK["muted"], "axes.titlecolor": _INK["muted"], "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.labelsize": 11, "axes.facecolor": "none", "figure.facecolor": "none", "grid.color": _INK["grid"], "grid.linewidth": 0.8,
    "xtick.color": _INK["muted"], "ytick.color": _INK["muted"], "xtick.labelsize": 11, "ytick.labelsize": 11, "font.size": 11,
    "xtick.major.size": 0, "ytick.major.size": 0, "text.color": _INK["muted"], "lines.solid_capstyle": "round",
    "savefig.facecolor": "none", "figure.dpi": 72,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A quantity over steps. points: (step, value), where None and nan leave a gap; boundary: the step after which the line is
    cut, since a loss may jump there; series: number of its colour, from 0."""

    points: Points
    boundary: float | None = None
    series: int = 0

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(step, value) for step, value in self.points if value is not None and is_known(value)]

    @property
    def stretches(self) -> list[np.ndarray]:
        """The known points [n, 2], cut at gaps and at the boundary."""
        table = np.array([(step, np.nan if value is None else value) for step, value in self.points], float).reshape(-1, 2)
        whole = np.isfinite(table[:, 1])
        cut = whole[1:] != whole[:-1]
        if self.boundary is not None:
            cut |= (table[:-1, 0] <= self.boundary) & (table[1:, 0] > self.boundary)
        parts = np.split(table, np.flatnonzero(cut) + 1)
        return [part for part in parts if len(part) and np.isfinite(part[0, 1])]

    @property
    def window(self) -> int:
        """Points in the longest mean of the smooth line; 0: it is too short to smooth."""
        return max((window(stretch) for stretch in self.stretches), default=0)


def window(stretch: np.ndarray) -> int:
    """Points in one mean of a smooth line (odd); 0 if the stretch is too short to smooth."""
    return len(stretch) // 10 | 1 if len(stretch) > _DOTS else 0


def smooth(values: np.ndarray, size: int) -> np.ndarray:
    """Centred mean over `size` values (fewer at the ends): the line neither lags nor gets shorter."""
    ones = np.ones(size)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def line_chart(
    lines: Sequence[Line], steps: tuple[float, float], unit: str, spoken: str, *, from_zero: bool = False, noisy: bool = False,
    warm_up: float | None = None,
) -> Markup:  # fmt: skip
    """Lines over training steps, of which at least one point is known. steps: ends of the axis; spoken: the chart in words;
    from_zero: y starts at 0; noisy: long stretches are smoothed; warm_up: its last step, to be shaded."""
    with _drawing(_WIDTH, _HEIGHT) as drawing:
        axes = drawing.axes((44, 30, 350, 178))
        for line in lines:
            for stretch in line.stretches:
                _draw(axes, stretch, _INK[f"s{line.series % SERIES + 1}"], noisy)
        axes.set_xlim(*steps)
        values = [value for line in lines for _, value in line.known]
        if from_zero and min(values) >= 0:
            axes.set_ylim(0, max(values) * 1.08 or 1.0)
        axes.set_title(unit, x=-44 / 306, pad=20)
        axes.set_xlabel("step", labelpad=2)
        _round_ticks(axes)
        if warm_up is not None and steps[0] < warm_up < steps[1]:
            _name_phases(axes, steps, warm_up)
        return drawing.svg(spoken)


def _draw(axes: Axes, stretch: np.ndarray, colour: str, noisy: bool) -> None:
    steps, values = stretch.T
    if len(stretch) <= _DOTS:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4.8, markeredgewidth=0)
        return
    if noisy:
        bins = [part for part in np.array_split(stretch, min(_BINS, len(stretch) // 2)) if len(part)]
        middle, low, high = np.array([(part[:, 0].mean(), part[:, 1].min(), part[:, 1].max()) for part in bins]).T
        axes.fill_between(middle, low, high, color=colour, alpha=0.25, linewidth=0.8)
        values = smooth(values, window(stretch))
    axes.plot(steps, values, color=colour, linewidth=1.8)


def _round_ticks(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    plain = ScalarFormatter(useOffset=False)
    plain.set_powerlimits((-3, 6))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.get_offset_text().set(x=1, horizontalalignment="right")  # the unit stands on the left


def _name_phases(axes: Axes, steps: tuple[float, float], warm_up: float) -> None:
    axes.axvspan(steps[0], warm_up, color=_INK["soft"], linewidth=0, zorder=0)
    axes.axvline(warm_up, color=_INK["muted"], linewidth=1, linestyle=(0, (3, 3)))
    share = (warm_up - steps[0]) / (steps[1] - steps[0])
    for text, side, room in (("warm-up", -1, share), ("MMCLIP", 1, 1 - share)):
        if room > _ROOM_FOR_LABEL:
            axes.annotate(text, (warm_up, 1), (5 * side, 5), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                          horizontalalignment="right" if side < 0 else "left", fontsize=10.5)  # fmt: skip


def describe(title: str, unit: str, line: Line) -> str:
    """A sentence for those who cannot see a chart of one line."""
    (first, before), (last, after) = line.known[0], line.known[-1]
    return (
        f"{title} ({unit}) over training steps: {significant(before)} at step {first:,.0f}, {significant(after)} at step "
        f"{last:,.0f}; the same figures are in the table below."
    )


def table_rows(line: Line) -> list[tuple[str, str]]:
    """(step, value) texts. If there are many they are evenly spaced; the first and the last are always included."""
    points = line.points
    every = max(1, math.ceil((len(points) - 1) / (_TABLED - 1)))
    rows = [*points[:-1:every], *points[-1:]]
    return [(f"{step:,.0f}", significant(value, 4)) for step, value in rows]


def roc_chart(curves: Sequence[tuple[Sequence[float], int]], spoken: str, *, small: bool = False) -> Markup:
    """Curves on one square. curves: true positive rates at evenly spaced false positive rates, and the number of the colour.
    small: to be shown at a third of a line chart's width."""
    size, text = (180, 16) if small else (330, 11)
    with _drawing(size, size) as drawing:
        axes = drawing.axes((2.2 * text, 2 * text, size - 6, size - 6))
        axes.plot([0, 1], [0, 1], color=_INK["chance"], linewidth=1, linestyle=(0, (4, 3)))
        for rates, series in curves:
            false = np.linspace(0, 1, len(rates))
            colour = _INK[f"s{series % SERIES + 1}"]
            axes.plot([0, *false], [0, *rates], color=colour, linewidth=1.8, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_xticklabels(["0", "0.5", "1"])
        axes.set_yticklabels(["0", "0.5", "1"])
        axes.tick_params(labelsize=text)
        axes.grid(True, axis="both")
        return drawing.svg(spoken)


@dataclass(frozen=True)
class Bar:
    """name; value: None where it is not known; text: the value as written; bounds: of its interval; strong: stands out."""

    name: str
    value: float | None
    text: str
    bounds: tuple[float, float] | None = None
    strong: bool = False


def bar_chart(bars: Sequence[Bar], spoken: str, *, end: float, reference: float | None = None) -> Markup:
    """Horizontal bars from 0 to `end`, the first on top, each under its name. reference: a dashed line, such as chance."""
    bars = [replace(bar, name=_printable(bar.name)) for bar in bars]
    row, below = 33, 20 if reference is not None else 4
    height = row * len(bars) + below + 4
    with _drawing(_WIDTH, height) as drawing:
        axes = drawing.axes((1, below, _WIDTH - 1, height - 4))
        for place, bar in enumerate(bars):
            axes.text(0, place - 0.2, bar.name, color=_INK["ink"], fontweight="bold" if bar.strong else "normal", fontsize=12)
            axes.text(end, place - 0.2, bar.text, color=_INK["ink"], fontweight="bold" if bar.strong else "normal", fontsize=12,
                      horizontalalignment="right")  # fmt: skip
            axes.barh(place + 0.14, end, 0.36, color=_INK["grid"])
            if bar.value is not None and is_known(bar.value):
                axes.barh(place + 0.14, bar.value, 0.36, color=_INK["s1"])
            if bar.bounds is not None and all(map(is_known, bar.bounds)):
                axes.plot(bar.bounds, [place + 0.14] * 2, color=_INK["ink"], linewidth=2, marker="|", markersize=9,
                          markeredgewidth=2)  # fmt: skip
        axes.set(xlim=(0, end), ylim=(len(bars) - 0.5, -0.65))
        axes.axis("off")
        if reference is not None:
            for place in range(len(bars)):
                axes.plot([reference] * 2, [place - 0.12, place + 0.4], color=_INK["chance"], linewidth=1.5, linestyle=":")
            axes.text(reference, len(bars) - 0.5, f"{reference:g}, chance", color=_INK["chance"], verticalalignment="top",
                      horizontalalignment="center")  # fmt: skip
        return drawing.svg(spoken)


def _printable(name: str) -> str:
    """A name of the data without the control characters that XML forbids."""
    return "".join(letter if letter.isprintable() else " " for letter in name)


def matrix_chart(values: np.ndarray, rows: str, columns: str, spoken: str) -> Markup:
    """values [N, N] as colours from the lowest to the highest. rows, columns: what they are."""
    with _drawing(_WIDTH, 348) as drawing:
        axes = drawing.axes((36, 30, 312, 342))
        shown = axes.imshow(values, cmap="viridis", interpolation="nearest", aspect="auto")
        axes.grid(False)
        ticks = range(0, len(values), max(1, len(values) // 8))
        axes.set(xticks=ticks, yticks=ticks, xticklabels=[str(n + 1) for n in ticks], yticklabels=[str(n + 1) for n in ticks])
        axes.set_xlabel(columns, labelpad=2)
        axes.set_ylabel(rows, labelpad=2)
        scale = drawing.axes((320, 30, 330, 342))
        drawing.figure.colorbar(shown, cax=scale, ticks=[float(values.min()), float(values.max())])
        scale.set_yticks([float(values.min()), float(values.max())], [significant(v, 2) for v in (values.min(), values.max())])
        scale.grid(False)
        for spine in (*axes.spines.values(), *scale.spines.values()):
            spine.set_visible(False)
        return drawing.svg(spoken)


# -- From Matplotlib to the page --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawing:
    """A figure of so many view box units."""

    figure: Figure
    width: float
    height: float

    def axes(self, box: tuple[float, float, float, float]) -> Axes:
        """Axes whose area has these edges: left, bottom, right, top, in view box units from below."""
        left, bottom, right, top = box
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, (right - left) / self.width, (top - bottom) / self.height)
        )

    def svg(self, spoken: str) -> Markup:
        """The drawing as inline SVG. The salt makes its ids those of this chart, and the same in every run."""
        import matplotlib

        drawn = io.BytesIO()
        with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": spoken}):
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's browser has the font
            self.figure.savefig(drawn, format="svg", metadata={"Date": None})
        return _inline(drawn.getvalue(), spoken)


@contextmanager
def _drawing(width: float, height: float) -> Iterator[_Drawing]:
    import matplotlib  # a second, which other commands need not spend
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield _Drawing(Figure(figsize=(width / 72, height / 72)), width, height)


_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_SWAPS = {colour: f"var(--{name})" for name, colour in _INK.items()}
_HREF = "{http://www.w3.org/1999/xlink}href"


def _inline(svg: bytes, spoken: str) -> Markup:
    """The SVG file as part of an HTML page: without what only a file needs, spoken to those who cannot see it."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style element would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (part.strip() if part else None for part in (element.text, element.tail))
        attributes = dict(element.attrib)
        if element.tag == "g" or attributes.get("transform", "").startswith("rotate(-0"):
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0"):
            del attributes["transform"]
        if _HREF in attributes:
            attributes["href"] = attributes.pop(_HREF)
        element.attrib.clear()
        element.attrib.update({name: _short(value) for name, value in attributes.items()})
    root.attrib = {"class": "chart", "role": "img", "viewBox": root.attrib["viewBox"]}
    title = ElementTree.Element("title")
    title.text = _printable(spoken)
    root.insert(0, title)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped all text


def _short(value: str) -> str:
    """An attribute with colours of the page, without fonts, and with no more digits than can be seen."""
    if value.startswith("data:"):
        return value
    value = re.sub(r"font-family:[^;]*;? ?", "", value)
    value = re.sub(r"#fe00[0-9a-f]{2}", lambda found: _SWAPS[found[0]], value)
    return _NUMBER.sub(lambda found: f"{float(found[0]):.1f}".replace(".0", ""), " ".join(value.split()))
