"""Charts and figures of the report: points lie where the axes say, and values are written as meant."""

from __future__ import annotations

import math
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest

from mmclip_dist.evaluate.report import charts, numbers
from mmclip_dist.evaluate.report.charts import Bar, Line, bar_chart, line_chart, matrix_chart, roc_chart

LEFT, RIGHT, TOP, BOTTOM = 44.0, 350.0, 34.0, 182.0  # the plotting area of a line chart, in its view box

# -- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0714285, "0.0714"),
        (12.345, "12.3"),
        (9.996, "10.0"),
        (4480.4, "4,480"),
        (1.639e-5, "1.64 × 10⁻⁵"),
        (-0.5, "−0.500"),
        (0, "0"),
        (math.nan, "not measured"),
        (math.inf, "not measured"),
        (None, "not measured"),
    ],
)
def test_values_have_three_significant_digits_or_words(value: float | None, text: str) -> None:
    assert numbers.significant(value) == text


def test_figures_in_columns_keep_their_decimals_and_sign() -> None:
    assert [numbers.fixed(value, 3) for value in (0.66666, -0.5, math.nan)] == ["0.667", "−0.500", "not measured"]
    assert [numbers.signed(value, 2) for value in (0.5, 0.0, -0.5, None)] == ["+0.50", "0.00", "−0.50", "not measured"]
    assert numbers.interval((0.6512, 0.6849)) == "0.651 to 0.685"
    assert numbers.interval((0.65, math.nan)) == "not measured"
    assert numbers.count(9600) == "9,600"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.23, "4.2 s"),
        (9.97, "10 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.8, "1 h 00 min"),
        (8130, "2 h 16 min"),
    ],
)
def test_durations_carry_over(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


# -- Charts -----------------------------------------------------------------------------------------------------------


def paths(svg: str, colour: str = "s1", kind: str = "stroke") -> list[list[tuple[float, float]]]:
    """Places of the paths that are drawn in a colour of the style sheet, without those of marks."""
    drawn = [
        element.attrib["d"]
        for element in ElementTree.fromstring(svg).iter("path")
        if f"{kind}: var(--{colour})" in element.get("style", "") and "id" not in element.attrib
    ]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in drawn]


def bands(svg: str) -> list[list[float]]:
    """Heights of the edges of filled bands, which Matplotlib draws through `use`, from below."""
    heights = [re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path) for path in re.findall(r'<path id="[^"]*" d="([^"]*)"', svg)]
    return [[212 + float(height) for height in of_path] for of_path in heights if len(of_path) > 100]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def chart(points: charts.Points, steps: tuple[float, float], boundary: float | None = None, **options) -> str:
    return str(line_chart([Line(points, boundary)], steps, "nats", "Loss", **options))


@pytest.mark.parametrize(
    ("from_zero", "labels"), [(True, ["0", "5", "10", "15", "20"]), (False, ["10.0", "12.5", "15.0", "17.5", "20.0"])]
)
def test_points_lie_where_the_axes_say(from_zero: bool, labels: list[str]) -> None:
    svg = chart(((30, 10.0), (80, 15.0), (130, 20.0)), (30, 130), from_zero=from_zero)
    (line,) = paths(svg)
    assert [x for x, _ in line] == pytest.approx([LEFT, (LEFT + RIGHT) / 2, RIGHT], abs=0.1)
    heights = {text.text: float(text.attrib["y"]) for text in ElementTree.fromstring(svg).iter("text")}
    assert [label for label in heights if label in labels] == labels
    between = (heights[labels[-3]] - heights[labels[-1]]) / (float(labels[-1]) - float(labels[-3]))
    assert [y for _, y in line] == pytest.approx([line[2][1] + between * (20 - value) for value in (10, 15, 20)], abs=0.2)
    assert line[0][1] > line[2][1]  # upwards
    if from_zero:
        assert line[0][1] == pytest.approx(BOTTOM - (BOTTOM - TOP) * 10 / 21.6, abs=0.1)


def test_small_values_share_one_power_of_ten_and_steps_are_short() -> None:
    found = texts(chart(((0, 0.0), (25_000, 4e-5)), (0, 25_000), from_zero=True))
    assert {"1e−5", "0", "1", "2", "3", "4", "5k", "10k"} <= set(found)


def test_the_boundary_is_drawn_at_its_step_and_cuts_the_line() -> None:
    points = tuple((float(step), 1.0 if step <= 40 else 5.0) for step in range(0, 101, 10))
    svg = chart(points, (0, 100), 40, warm_up=40)
    (boundary,) = (path for path in paths(svg, "muted") if len(path) == 2 and path[0][0] == path[1][0])
    assert boundary[0][0] == pytest.approx(LEFT + 0.4 * (RIGHT - LEFT), abs=0.1)
    assert [len(line) for line in paths(svg)] == [5, 6]
    assert {"warm-up", "MMCLIP"} <= set(texts(svg))
    assert "warm-up" not in texts(chart(points, (0, 100), 5, warm_up=5))  # no room


def test_a_gap_stays_a_gap() -> None:
    line = Line(((1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, None)))
    assert [stretch.tolist() for stretch in line.stretches] == [[[1, 1], [2, 2]], [[4, 3]]]
    assert line.known == [(1, 1.0), (2, 2.0), (4, 3.0)]
    assert [value for _, value in charts.table_rows(line)] == ["1.000", "2.000", "not measured", "3.000", "not measured"]
    svg = str(line_chart([line], (0, 5), "nats", "Loss"))
    assert svg.count("<use") == 3  # a mark each, also where there is no line
    assert [len(path) for path in paths(svg)] == [2, 1]


def test_smoothing_keeps_a_straight_line_and_the_mean_of_noise() -> None:
    assert charts.smooth(2.0 * np.arange(100), 9)[4:-4] == pytest.approx(2.0 * np.arange(4, 96))
    assert charts.smooth(np.array([1.0, 2, 6]), 3) == pytest.approx([1.5, 3, 4])


def test_long_noisy_curves_are_smooth_over_a_band_that_keeps_spikes() -> None:
    long = tuple((float(step), 1000.0 if step == 777 else float(step % 7)) for step in range(5000))
    svg = chart(long, (0, 5000), noisy=True)
    (band,) = bands(svg)
    assert min(band) < TOP + 20 and max(band) > BOTTOM - 20 and "1000" in texts(svg)  # the spike is at the top
    (line,) = paths(svg)
    assert len(line) < 2000 and len(svg) < 60_000
    assert not bands(chart(long, (0, 5000)))
    assert not bands(chart(long[:20], (0, 20), noisy=True))  # dots
    assert Line(long[:20]).window == 0 and Line(long).window == 501


def test_runs_have_colours_of_their_own() -> None:
    svg = str(line_chart([Line(((0, 1.0), (9, 2.0)), series=n) for n in range(charts.SERIES)], (0, 9), "nats", "Loss"))
    assert [len(paths(svg, f"s{n + 1}")) for n in range(charts.SERIES)] == [1] * charts.SERIES


def test_a_curve_stands_above_chance_where_it_is_better() -> None:
    svg = str(roc_chart([([0.5, 1.0, 1.0], 1)], "ROC"))
    (curve,) = paths(svg, "s2")
    assert np.allclose(curve, [(24.2, 308), (24.2, 157), (174.1, 6), (324, 6)], atol=0.6)
    assert np.allclose(paths(svg, "chance"), [[(24.2, 308), (324, 6)]], atol=0.6)


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("A", 0.8, "0.800"), Bar("Mean", 0.5, "0.500", (0.4, 0.6)), Bar("B", None, "?")]
    svg = str(bar_chart(bars, "AUC", end=1, reference=0.5))
    widths = [path[1][0] - path[0][0] for path in paths(svg, kind="fill")]
    assert widths == pytest.approx([0.8 * 358, 0.5 * 358], abs=0.3)
    (whisker,) = (path for path in paths(svg, "ink") if len(path) == 2)
    assert [x for x, _ in whisker] == pytest.approx([1 + 0.4 * 358, 1 + 0.6 * 358], abs=0.3)
    assert [x for path in paths(svg, "chance") for x, _ in path] == pytest.approx([180] * 6, abs=0.3)


def test_charts_hold_no_colour_font_or_address_of_their_own() -> None:
    """The page's style sheet colours them, in light and in dark; nothing is loaded; ids are those of the one chart."""
    drawn = [
        chart(((0, 1.0), (9, 2.0)), (0, 9), 4, warm_up=4), str(roc_chart([([0.5, 1.0], 0)], "ROC")),
        str(bar_chart([Bar("A", 0.8, "0.8", (0.7, 0.9))], "AUC", end=1, reference=0.5)),
        str(matrix_chart(np.eye(9), "image", "report", "S")),
    ]  # fmt: skip
    for svg in drawn:
        assert not re.search(r"#fe00|font-family|https?:|<style|<metadata|xmlns", svg)
        assert svg.startswith('<svg class="chart" role="img" viewBox=') and "<title>" in svg
    coloured = re.compile(r"(?:fill|stroke): #(?!ffffff)")
    assert not [svg for svg in drawn[:3] if coloured.search(svg)]
    ids = [name for svg in drawn for name in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", ["<b>&$x^2$", "肺炎", "a\x00\x1bb", "$\\frac{1}{"])
def test_any_name_is_drawn_as_it_is(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = str(bar_chart([Bar(name, 0.5, "0.5")], f"AUC {name}", end=1))
    assert texts(svg)[0] == name.replace("\x00", " ").replace("\x1b", " ")
