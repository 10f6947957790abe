"""The report of a run as one HTML file: figures, charts and examples put into `template.html`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from mmclip_shards.storage import write_atomic

from mmclip_dist.checkpoint.folder import newest_checkpoint
from mmclip_dist.evaluate.report import numbers
from mmclip_dist.evaluate.report.charts import LineChart, bar, line_chart, table_rows
from mmclip_dist.evaluate.report.examples import Gallery, build_gallery
from mmclip_dist.evaluate.report.sources import Job, Phase, Row, read_job, training_seconds, training_sets, usual_speed
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
class BarRow:
    """A row of a table of bars. figure, note: texts beside the bar."""

    name: str
    bar: Markup
    figure: str
    note: str = ""


@dataclass(frozen=True)
class DrawnChart:
    """svg: None if no value is finite; smoothed: rows in each mean of the smooth line, 0: none; logged: number of rows."""

    title: str
    unit: str
    svg: Markup | None
    smoothed: int
    logged: int
    table: list[tuple[str, str]]


def build_report(folder: Path, stages: Sequence[tuple[str, float]] = (), images: Sequence[str] = ()) -> Path:
    """Write `folder`/report.html, atomically, and return its path. The same input gives the same bytes.

    folder: a training run, or a quick start with warmup/ and train/. stages: (name, seconds), by default those of
    summary.json. images: packed, labelled sets to show examples of, as the newest checkpoint sees them.
    ValueError if the folder holds no run, or if one of its files or of the sets cannot be read.
    """
    job = read_job(Path(folder), stages)
    gallery, charts = _gallery(job, images), _loss_charts(job) + _other_charts(job)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmclip_dist.evaluate.report", "."), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page = environment.get_template("template.html").render(
        job=job, title=run_title(job), subtitle=_subtitle(job), key_figures=key_figures(job), charts=charts,
        smoothed=max((chart.smoothed for chart in charts), default=0),
        classes=_class_bars(job.result) if job.result else [],
        mean=_macro_bar(job.result) if job.result else None, stages=_stage_bars(job.stages), gallery=gallery,
        wants_images=bool(images), sources=training_sets(job.phases), synthetic=synthetic_sets(job, gallery),
        commands=_commands(job.phases), evaluate=_evaluate_command(job),
        environment=_last_environment(job.phases), numbers=numbers,
    )  # fmt: skip
    path = Path(folder) / "report.html"
    write_atomic(str(path), page.encode())
    return path


def _gallery(job: Job, images: Sequence[str]) -> Gallery | None:
    """Examples scored by the last phase that has a checkpoint; None without images or checkpoint."""
    found = [checkpoint for phase in job.phases if (checkpoint := newest_checkpoint(phase.folder))]
    return build_gallery(found[-1], images) if images and found else None


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


def synthetic_sets(job: Job, gallery: Gallery | None) -> list[str]:
    """Sorted names of the synthetic data sets among those that were trained on, evaluated on or shown."""
    shown = gallery.datasets if gallery else ()
    tested = job.result.datasets if job.result else ()
    names = {name for name in (*training_sets(job.phases).values(), *tested, *shown) if name}
    return sorted(name for name in names if name.partition("/")[0] in ("synthetic", "synthetic-unpaired"))


# -- Figures ----------------------------------------------------------------------------------------------------------


def key_figures(job: Job) -> list[KeyFigure]:
    rows, result = job.rows, job.result
    last = rows[-1] if rows else None
    optim = job.phases[-1].settings.get("optim") or {}
    planned = optim.get("steps")
    staged = sum(seconds for _, seconds in job.stages)
    control = []
    if job.control:
        of_control, steps = job.control
        told = f"same processor time: {numbers.count(steps)} steps; 95% interval {numbers.interval(of_control.auc_macro_ci95)}"
        control = [KeyFigure("Macro AUC, contrastive training alone", numbers.fixed(of_control.auc_macro, 3), told)]
    return [
        KeyFigure(
            "Macro AUC, zero-shot",
            numbers.fixed(result.auc_macro if result else None, 3),
            f"95% interval {numbers.interval(result.auc_macro_ci95)}" if result else "no zeroshot.json",
        ),
        *control,
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


def _class_bars(result: ZeroShot) -> list[BarRow]:
    """Classes by falling AUC, classes without a value last."""

    def order(entry: tuple[str, float]) -> tuple[bool, float, str]:
        name, auc = entry
        return (not numbers.is_known(auc), -auc if numbers.is_known(auc) else 0.0, name)

    return [_auc_bar(name, auc) for name, auc in sorted(result.per_class.items(), key=order)]


def _auc_bar(name: str, auc: float) -> BarRow:
    figure = numbers.fixed(auc, 3)
    share = auc if numbers.is_known(auc) else 0.0
    return BarRow(name, bar(share, f"{name}: AUC {figure}, chance 0.5", reference=_CHANCE), figure)


def _macro_bar(result: ZeroShot) -> BarRow:
    figure = numbers.fixed(result.auc_macro, 3)
    share = result.auc_macro if numbers.is_known(result.auc_macro) else 0.0
    drawn = bar(
        share, f"Macro mean: AUC {figure}, 95% interval {numbers.interval(result.auc_macro_ci95)}",
        reference=_CHANCE, bounds=result.auc_macro_ci95,
    )  # fmt: skip
    return BarRow("Macro mean", drawn, figure)


def _stage_bars(stages: Sequence[tuple[str, float]]) -> list[BarRow]:
    total = sum(seconds for _, seconds in stages) or 1.0
    return [
        BarRow(
            name, bar(seconds / total, f"{name}: {numbers.duration(seconds)}"),
            numbers.duration(seconds), _share(seconds / total),
        )
        for name, seconds in stages
    ]  # fmt: skip


def _share(share: float) -> str:
    return "< 1%" if 0 < share < 0.005 else f"{share:.0%}"


# -- Charts -----------------------------------------------------------------------------------------------------------


def _loss_charts(job: Job) -> list[DrawnChart]:
    """One chart a term; the known terms first, in the order of the method, then any other."""
    found = {name for row in job.rows for name in row["loss"]}
    names = [name for name in _LOSSES if name in found] + sorted(found - set(_LOSSES))
    return [_loss_chart(job, name) for name in names]


def _loss_chart(job: Job, name: str) -> DrawnChart:
    title, unit = _LOSSES.get(name, (f"{name} loss", "unit not known"))
    return _draw(job, title, unit, lambda row: row["loss"].get(name), noisy=True)


def _other_charts(job: Job) -> list[DrawnChart]:
    if not job.rows:
        return []
    return [
        _draw(job, "Learning rate", "dimensionless", lambda row: row["lr"], from_zero=True),
        _draw(job, "Temperature", "dimensionless", lambda row: row["temperature"]),
        _draw(job, "Throughput", "samples/s", lambda row: row["samples_per_s"], from_zero=True, noisy=True),
        _draw(job, "Waiting for data", "% of the time", _waiting, from_zero=True, noisy=True),
        _draw(job, "Host memory of the first rank", "GiB", lambda row: row["memory_gib"], from_zero=True),
    ]


def _waiting(row: Row) -> float:
    return 100.0 * row["data_wait"]


def _draw(job: Job, title: str, unit: str, value: Callable[[Row], float | None], **options: bool) -> DrawnChart:
    """options: from_zero and noisy, as of `LineChart`."""
    points = tuple((float(row["step"]), value(row)) for row in job.rows)
    chart = LineChart(title, unit, points, _step_axis(job), job.boundary, **options)
    svg = line_chart(chart) if chart.known else None
    return DrawnChart(title, unit, svg, chart.window, len(points), table_rows(chart))


def _step_axis(job: Job) -> tuple[float, float]:
    """First step of the axis: 0, or that of the checkpoint a run resumed from if most of the axis would be empty."""
    first, last = job.rows[0]["step"], job.rows[-1]["step"]
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
    words = ["--checkpoint", str(job.phases[-1].folder), "--out", str(job.folder / "zeroshot.json")]
    return f"mmclip evaluate zeroshot SET {shlex.join(words)}"


def _last_environment(phases: Sequence[Phase]) -> list[tuple[str, str]]:
    """(name, value) of machine and versions, from the last phase that recorded them."""
    known = [phase.environment for phase in phases if phase.environment]
    if not known:
        return []
    found = known[-1]
    facts = {"ranks": "world_size", "Python": "python", "machine": "machine", "git": "git"}
    pairs = [(name, found.get(field)) for name, field in facts.items()] + list((found.get("versions") or {}).items())
    return [(name, numbers.NOT_MEASURED if value is None else str(value)) for name, value in pairs]
