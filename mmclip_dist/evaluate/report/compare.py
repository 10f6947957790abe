"""Several runs on one page: curves overlaid, figures side by side, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmclip_dist.evaluate.report import numbers
from mmclip_dist.evaluate.report.charts import SERIES, Line, line_chart, roc_chart
from mmclip_dist.evaluate.report.page import (
    DrawnChart,
    Quantity,
    key_figures,
    quantities,
    step_axis,
    synthetic_sets,
    write_page,
)
from mmclip_dist.evaluate.report.sources import Job, read_job
from mmclip_dist.evaluate.result import MACRO

_ABSENT = "–"
_PLACES = frozenset({"run_dir", "data.sources", "model.text.tokenizer", "checkpoint.start_from"})  # differ, and change nothing


@dataclass(frozen=True)
class Compared:
    """A run and what it is called on the page."""

    name: str
    job: Job


def build_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page that compares runs (by default comparison.html in the first one's folder), atomically -> its path.

    ValueError as of `read_job`, for a folder that is named twice, and for more runs than there are colours.
    """
    if len(folders) > SERIES:
        raise ValueError(f"{len(folders)} runs are too many for one page: name at most {SERIES}")
    places = [folder.resolve() for folder in folders]
    if twice := [str(place) for number, place in enumerate(places) if place in places[:number]]:
        raise ValueError(f"{twice[0]} is named twice: name each run once")
    runs = [Compared(name, read_job(folder)) for name, folder in zip(names_of(places), folders, strict=True)]
    charts = [_overlaid(runs, quantity) for quantity in quantities([row for run in runs for row in run.job.rows])]
    return write_page(
        "compare.html", out or folders[0] / "comparison.html",
        runs=runs, figures=list(_figures(runs)), charts=charts, roc=_roc(runs), settings=list(differing(
            {run.name: settings_of(run.job) for run in runs})),
        smoothed=max((chart.smoothed for chart in charts), default=0), absent=_ABSENT,
        synthetic=sorted({name for run in runs for name in synthetic_sets(run.job, ())}),
    )  # fmt: skip


def names_of(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("equal paths")


def _figures(runs: Sequence[Compared]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Rows of a table: a name, and (value, note) of each run."""
    for columns in zip(*(key_figures(run.job, control=False) for run in runs), strict=True):
        yield columns[0].name, [(figure.value, figure.note) for figure in columns]
    results = [run.job.result for run in runs]
    for name in dict.fromkeys(name for result in results if result for name in result.per_class):
        yield f"AUC, {name}", [(numbers.fixed(result.per_class.get(name), 3) if result else _ABSENT, "") for result in results]
    yield "Evaluated on", [(", ".join(result.datasets) if result else _ABSENT, "") for result in results]


def _overlaid(runs: Sequence[Compared], quantity: Quantity) -> DrawnChart:
    lines = [
        Line(tuple((float(row["step"]), quantity.value(row)) for row in run.job.rows), run.job.boundary, series)
        for series, run in enumerate(runs)
    ]
    known = [(run.name, line.known) for run, line in zip(runs, lines, strict=True)]
    table = [
        (name, *(numbers.significant(value, 4) for value in (points[0][1], min(v for _, v in points), points[-1][1])))
        if points else (name, *[_ABSENT] * 3)
        for name, points in known
    ]  # fmt: skip
    svg = None
    if any(points for _, points in known):
        steps = step_axis([row for run in runs for row in run.job.rows])
        spoken = f"{quantity.title} ({quantity.unit}) over training steps, at the end: " + "; ".join(
            f"{name} {numbers.significant(points[-1][1]) if points else numbers.NOT_MEASURED}" for name, points in known
        )
        svg = line_chart(lines, steps, quantity.unit, spoken, from_zero=quantity.from_zero, noisy=quantity.noisy)
    smoothed = max(line.window for line in lines) if quantity.noisy else 0
    return DrawnChart(quantity.title, quantity.unit, svg, smoothed, ("Run", "First", "Lowest", "Last"), table, len(table))


def _roc(runs: Sequence[Compared]) -> Markup | None:
    """The mean curves of the runs that have one."""
    results = [(series, run.name, run.job.result) for series, run in enumerate(runs)]
    known = [(series, name, found) for series, name, found in results if found and MACRO in found.roc]
    if not known:
        return None
    spoken = "; ".join(f"{name} AUC {numbers.fixed(found.auc_macro, 3)}" for _, name, found in known)
    return roc_chart([(found.roc[MACRO], series) for series, _, found in known], f"Mean ROC curves: {spoken}")


def settings_of(job: Job) -> dict[str, Any]:
    """The settings of the last phase, by their whole names."""
    return dict(_flat("", job.phases[-1].settings))


def _flat(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def differing(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """settings: of each run -> (name, texts) of those that are not the same in all. Places of files are left out."""
    every = dict.fromkeys(name for of_run in settings.values() for name in of_run)
    for name in sorted(every.keys() - _PLACES):
        texts = [str(of_run[name]) if name in of_run else _ABSENT for of_run in settings.values()]
        if len(set(texts)) > 1:
            yield name, texts
