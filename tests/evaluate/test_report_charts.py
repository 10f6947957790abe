"""Charts and figures of the report: points lie where the axes say, and values are written as meant."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from mmclip_dist.evaluate.report import charts, numbers
from mmclip_dist.evaluate.report.charts import BOTTOM, LEFT, RIGHT, TOP, LineChart, line_chart

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


@pytest.mark.parametrize(
    ("from_zero", "low", "high", "labels"),
    [(True, 0, 21.6, ["0", "5", "10", "15", "20"]), (False, 9.4, 20.6, ["10", "12", "14", "16", "18", "20"])],
)
def test_points_lie_where_the_axes_say(from_zero: bool, low: float, high: float, labels: list[str]) -> None:
    points = ((20, 10.0), (70, 15.0), (120, 20.0))
    svg = str(line_chart(LineChart("Speed", "m/s", points, (20, 120), from_zero=from_zero)))

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    (line,) = re.findall(r'class="line" points="([^"]*)"', svg)
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    expected = [(LEFT + (RIGHT - LEFT) * (step - 20) / 100, height(value)) for step, value in points]
    assert np.allclose(places, expected, atol=0.06)
    ticks = re.findall(r'class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="end">([^<]*)', svg)
    assert [label for *_, label in ticks] == labels
    assert all(abs(float(y) - 4 - height(float(label))) < 0.06 for _, y, label in ticks)


def test_small_values_share_one_power_of_ten() -> None:
    svg = str(line_chart(LineChart("Rate", "dimensionless", ((0, 0.0), (10, 4e-5)), (0, 10), from_zero=True)))
    assert "dimensionless, × 10⁻⁵" in svg
    assert re.findall(r'text-anchor="end">([^<]*)', svg) == ["0", "1", "2", "3", "4"]


def test_the_boundary_is_drawn_at_its_step_and_cuts_the_line() -> None:
    points = tuple((float(step), 1.0 if step <= 40 else 5.0) for step in range(0, 101, 10))
    svg = str(line_chart(LineChart("Loss", "nats", points, (0, 100), boundary=40)))
    (x,) = re.findall(r'class="boundary" x1="([\d.]+)"', svg)
    assert float(x) == pytest.approx(LEFT + 0.4 * (RIGHT - LEFT), abs=0.05)
    lines = re.findall(r'class="line" points="([^"]*)"', svg)
    assert [len(line.split()) for line in lines] == [5, 6]
    assert ">warm-up<" in svg
    assert ">MMCLIP<" in svg


def test_a_gap_stays_a_gap() -> None:
    chart = LineChart("Loss", "nats", ((1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, None)), (0, 5))
    assert chart.stretches == [[(1, 1.0), (2, 2.0)], [(4, 3.0)]]
    assert str(line_chart(chart)).count("<circle") == 3
    assert [value for _, value in charts.table_rows(chart)] == [
        "1.000",
        "2.000",
        "not measured",
        "3.000",
        "not measured",
    ]


def test_smoothing_keeps_a_straight_line_and_the_mean_of_noise() -> None:
    straight = [(float(step), 2.0 * step) for step in range(100)]
    middle = charts.smooth(straight, 9)[4:-4]
    assert middle == [(step, pytest.approx(value)) for step, value in straight[4:-4]]
    assert charts.smooth([(0, 1.0), (1, 2.0), (2, 6.0)], 3) == [(0, 1.5), (1, 3.0), (2, 4.0)]


def test_thinning_keeps_spikes_ends_and_order() -> None:
    points = [(float(step), 1000.0 if step == 777 else float(step % 7)) for step in range(5000)]
    kept = charts.thin(points, 300)
    assert len(kept) <= 300
    assert points[777] in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)


def test_only_long_noisy_curves_are_smoothed() -> None:
    long = tuple((float(step), float(step)) for step in range(200))
    noisy = line_chart(LineChart("Loss", "nats", long, (0, 200), noisy=True))
    assert noisy.count('class="raw"') == noisy.count('class="line"') == 1
    assert line_chart(LineChart("Rate", "-", long, (0, 200))).count('class="raw"') == 0
    assert line_chart(LineChart("Loss", "nats", long[:20], (0, 200), noisy=True)).count('class="raw"') == 0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.38, 3.57), (0, 4.8e-7), (-2, 5), (0, 123456)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in found)
    assert len(set(charts.tick_labels([value / 10 ** math.floor(math.log10(high)) for value in found]))) == len(found)
