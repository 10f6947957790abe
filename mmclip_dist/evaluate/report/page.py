"""The report of a run as one HTML file: figures, charts and examples put into `template.html`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from mmclip_shards.storage import write_atomic

from mmclip_dist.checkpoint.folder import newest_checkpoint
from mmclip_dist.evaluate.report import numbers
from mmclip_dist.evaluate.report.answers import (
    ClassErrors,
    Retrieval,
    Similarity,
    embedded_pairs,
    retrieval,
    similarity,
    worst_errors,
)
from mmclip_dist.evaluate.report.charts import Bar, Line, bar_chart, describe, line_chart, roc_chart, table_rows
from mmclip_dist.evaluate.report.examples import Panel, attention_panels
from mmclip_dist.evaluate.report.held_out import HeldOut, NotShown
from mmclip_dist.evaluate.report.rebuilt import RebuiltImage, RebuiltReport, rebuilt_images, rebuilt_reports
from mmclip_dist.evaluate.report.sources import Job, Phase, Row, read_job, training_seconds, training_sets, usual_speed
from mmclip_dist.evaluate.result import MACRO
from mmclip_dist.evaluate.zeroshot import ZeroShot

_CHANCE = 0.5  # AUC of a guess

_LOSSES = {  # term -> title and unit
    "contrastive": ("Contrastive loss", "nats"),
    "image": ("Image reconstruction loss (AttMIM)", "squared error of normalised pixels"),
    "entity": ("Entity loss (EntMLM)", "nats per masked token"),
}


@dataclass(frozen=True)
class KeyFigure:
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class DrawnChart:
    """svg: None if no value is finite; smoothed: points in each mean of the smooth lines, 0: none; head, table: what its table
    shows; logged: number of rows that there are."""

    title: str
    unit: str
    svg: Markup | None
    smoothed: int
    head: tuple[str, ...]
    table: Sequence[tuple[str, ...]]
    logged: int


@dataclass(frozen=True)
class Curve:
    """A ROC curve, drawn."""

    name: str
    auc: str
    svg: Markup


@dataclass(frozen=True)
class Data:
    """What the page shows of held-out sets, which the user named for that."""

    held: HeldOut
    panels: tuple[Panel, ...] | NotShown
    images: tuple[RebuiltImage, ...] | NotShown
    reports: tuple[RebuiltReport, ...] | NotShown
    errors: tuple[ClassErrors, ...] | NotShown
    retrieval: Retrieval | NotShown
    similarity: Similarity | NotShown

    @classmethod
    def of(cls, held: HeldOut) -> Data:
        pairs = embedded_pairs(held)
        found, matrix = (pairs, pairs) if isinstance(pairs, NotShown) else (retrieval(held, pairs), similarity(held, pairs))
        return cls(
            held, attention_panels(held), rebuilt_images(held), rebuilt_reports(held), worst_errors(held), found, matrix
        )


def build_report(
    folder: Path, stages: Sequence[tuple[str, float]] = (), data: Sequence[str] = (), out: Path | None = None
) -> Path:
    """Write `folder`/report.html (or `out`), atomically, and return its path. The same input gives the same bytes.

    folder: a training run, or a quick start with warmup/ and train/. stages: (name, seconds), by default those of
    summary.json. data: packed sets to show samples of, as the newest checkpoint sees them; no other set gives the page an image
    or a report. ValueError if the folder holds no run, or if one of its files or of the sets cannot be read.
    """
    job = read_job(Path(folder), stages)
    found = [checkpoint for phase in job.phases if (checkpoint := newest_checkpoint(phase.folder))]
    shown = Data.of(HeldOut(found[-1], data)) if data and found else None
    charts = [_draw(job, quantity) for quantity in quantities(job.rows)]
    return write_page(
        "template.html", out or Path(folder) / "report.html",
        job=job, title=run_title(job), subtitle=_subtitle(job), key_figures=key_figures(job), charts=charts,
        smoothed=max((chart.smoothed for chart in charts), default=0), classes=_class_chart(job.result) if job.result else None,
        curves=_curves(job.result) if job.result else [], stages=_stage_chart(job.stages), data=shown, named=bool(data),
        sources=training_sets(job.phases), synthetic=synthetic_sets(job, shown.held.datasets if shown else ()),
        commands=_commands(job.phases), evaluate=_evaluate_command(job), environment=_last_environment(job.phases),
    )  # fmt: skip


def write_page(template: str, path: Path, **values: Any) -> Path:
    """Fill a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmclip_dist.evaluate.report", "."), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    write_atomic(str(path), environment.get_template(template).render(numbers=numbers, **values).encode())
    return path


def run_title(job: Job) -> str:
    """The recipe's name if the command holds it, else the folder's name."""
    for phase in reversed(job.phases):
        words = [str(word) for word in (phase.environment or {}).get("command", [])[1:]]
        recipes = [word for word in words if "=" not in word and not word.startswith("-")]
        if recipes:
            return Path(recipes[0]).stem
    return job.folder.resolve().name


def _subtitle(job: Job) -> str:
    parts = [f"folder {job.folder.resolve().name}"]
    if job.phases[0].name:
        parts.append("quick start: " + " and ".join(phase.name for phase in job.phases))
    if job.result:
        parts.append(f"evaluated on {', '.join(job.result.datasets)}")
    return " · ".join(parts)


def synthetic_sets(job: Job, shown: Sequence[str]) -> list[str]:
    """Sorted names of the synthetic data sets among those that were trained on, evaluated on or shown."""
    tested = job.result.datasets if job.result else ()
    names = {name for name in (*training_sets(job.phases).values(), *tested, *shown) if name}
    return sorted(name for name in names if name.partition("/")[0] in ("synthetic", "synthetic-unpaired"))


# -- Figures ----------------------------------------------------------------------------------------------------------


def key_figures(job: Job, *, control: bool = True) -> list[KeyFigure]:
    """control: also that of a quick start's control, if it has one."""
    rows, result = job.rows, job.result
    last = rows[-1] if rows else None
    optim = job.phases[-1].settings.get("optim") or {}
    planned = optim.get("steps")
    staged = sum(seconds for _, seconds in job.stages)
    beside = []
    if control and job.control:
        of_control, steps = job.control
        told = f"same processor time: {numbers.count(steps)} steps; 95% interval {numbers.interval(of_control.auc_macro_ci95)}"
        beside = [KeyFigure("Macro AUC, contrastive training alone", numbers.fixed(of_control.auc_macro, 3), told)]
    return [
        KeyFigure(
            "Macro AUC, zero-shot",
            numbers.fixed(result.auc_macro if result else None, 3),
            f"95% interval {numbers.interval(result.auc_macro_ci95)}" if result else "no zeroshot.json",
        ),
        *beside,
        KeyFigure(
            "Steps",
            numbers.count(last["step"]) if last else numbers.NOT_MEASURED,
            f"of {numbers.count(planned)} in the schedule" if planned else "",
        ),
        KeyFigure(
            "Samples seen",
            numbers.count(last["samples"]) if last else numbers.NOT_MEASURED,
            f"{numbers.count(optim['global_batch'])} a step" if "global_batch" in optim else "",
        ),
        KeyFigure(
            "Samples per second",
            numbers.significant(usual_speed(job.phases)),
            "median" + (", MMCLIP phase" if job.boundary is not None else ""),
        ),
        KeyFigure(
            "Wall time",
            numbers.duration(staged if job.stages else training_seconds(job.phases)),
            "all stages" if job.stages else "training loop, from its throughput",
        ),
    ]


def _class_chart(result: ZeroShot) -> Markup:
    """Classes by falling AUC, classes without a value last, then their mean."""

    def order(entry: tuple[str, float]) -> tuple[bool, float, str]:
        name, auc = entry
        return (not numbers.is_known(auc), -auc if numbers.is_known(auc) else 0.0, name)

    bars = [Bar(name, auc, numbers.fixed(auc, 3)) for name, auc in sorted(result.per_class.items(), key=order)]
    mean = Bar("Macro mean", result.auc_macro, numbers.fixed(result.auc_macro, 3), result.auc_macro_ci95, strong=True)
    spoken = "AUC by class, chance 0.5: " + "; ".join(f"{bar.name} {bar.text}" for bar in [*bars, mean])
    return bar_chart([*bars, mean], f"{spoken}, 95% interval {numbers.interval(result.auc_macro_ci95)}", end=1, reference=_CHANCE)


def _curves(result: ZeroShot) -> list[Curve]:
    """The mean curve, then those of the classes by falling AUC."""
    aucs = {MACRO: result.auc_macro, **dict(sorted(result.per_class.items(), key=lambda entry: -entry[1]))}
    return [
        _curve("Macro mean" if name == MACRO else name, numbers.fixed(auc, 3), result.roc[name])
        for name, auc in aucs.items()
        if name in result.roc
    ]


def _curve(title: str, auc: str, rates: Sequence[float]) -> Curve:
    return Curve(title, auc, roc_chart([(rates, 0)], f"ROC curve of {title}: AUC {auc}", small=True))


def _stage_chart(stages: Sequence[tuple[str, float]]) -> Markup | None:
    if not stages:
        return None
    total = sum(seconds for _, seconds in stages) or 1.0
    bars = [Bar(name, seconds, f"{numbers.duration(seconds)} · {_share(seconds / total)}") for name, seconds in stages]
    spoken = "Duration by stage: " + "; ".join(f"{bar.name} {bar.text}" for bar in bars)
    return bar_chart(bars, spoken, end=max(*(seconds for _, seconds in stages), 1e-9))


def _share(share: float) -> str:
    return "< 1%" if 0 < share < 0.005 else f"{share:.0%}"


# -- Charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """What a chart shows of each row. noisy, from_zero: as of `line_chart`."""

    title: str
    unit: str
    value: Callable[[Row], float | None]
    from_zero: bool = False
    noisy: bool = False


def quantities(rows: Sequence[Row]) -> list[Quantity]:
    """The terms of the loss, the known ones first, in the order of the method; then the course of the training."""
    if not rows:
        return []
    found = {name for row in rows for name in row["loss"]}
    names = [name for name in _LOSSES if name in found] + sorted(found - set(_LOSSES))
    return [
        *(Quantity(*_LOSSES.get(name, (f"{name} loss", "unit not known")), partial(_loss, name), noisy=True) for name in names),
        Quantity("Learning rate", "dimensionless", itemgetter("lr"), from_zero=True),
        Quantity("Temperature", "dimensionless", itemgetter("temperature")),
        Quantity("Throughput", "samples/s", itemgetter("samples_per_s"), from_zero=True, noisy=True),
        Quantity("Waiting for data", "% of the time", _waiting, from_zero=True, noisy=True),
        Quantity("Host memory of the first rank", "GiB", itemgetter("memory_gib"), from_zero=True),
    ]


def _loss(name: str, row: Row) -> float | None:
    value: float | None = row["loss"].get(name)
    return value


def _waiting(row: Row) -> float:
    return 100.0 * row["data_wait"]


def _draw(job: Job, quantity: Quantity) -> DrawnChart:
    title, unit = quantity.title, quantity.unit
    line = Line(tuple((float(row["step"]), quantity.value(row)) for row in job.rows), job.boundary)
    svg = None
    if line.known:
        svg = line_chart(
            [line], step_axis(job.rows), unit, describe(title, unit, line), from_zero=quantity.from_zero, noisy=quantity.noisy,
            warm_up=job.boundary,
        )  # fmt: skip
    smoothed = line.window if quantity.noisy else 0
    return DrawnChart(title, unit, svg, smoothed, ("Step", unit), table_rows(line), len(line.points))


def step_axis(rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of an axis. The first is 0, or the step of the checkpoint that runs resumed from if most of it would be empty."""
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    return (0.0 if first <= 0.3 * last or first == last else float(first), float(last) or 1.0)


# -- The run ----------------------------------------------------------------------------------------------------------


def _commands(phases: Sequence[Phase]) -> list[tuple[str, str]]:
    """(phase, command) of each phase that recorded its command."""
    return [
        (phase.name, shlex.join(str(word) for word in phase.environment["command"]))
        for phase in phases
        if phase.environment and phase.environment.get("command")
    ]


def _evaluate_command(job: Job) -> str:
    """The command that writes the missing zeroshot.json."""
    run, out = shlex.quote(str(job.phases[-1].folder)), shlex.quote(str(job.folder / "zeroshot.json"))
    return f"mmclip evaluate zeroshot {run} --data URL --out {out}"


def _last_environment(phases: Sequence[Phase]) -> list[tuple[str, str]]:
    """(name, value) of machine and versions, from the last phase that recorded them."""
    known = [phase.environment for phase in phases if phase.environment]
    if not known:
        return []
    found = known[-1]
    facts = {"ranks": "world_size", "Python": "python", "machine": "machine", "git": "git"}
    pairs = [(name, found.get(field)) for name, field in facts.items()] + list((found.get("versions") or {}).items())
    return [(name, numbers.NOT_MEASURED if value is None else str(value)) for name, value in pairs]
