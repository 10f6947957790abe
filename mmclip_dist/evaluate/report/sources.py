"""The input of a report: the files of a run, or of the two runs of a quick start, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from mmclip_shards.manifest import load_manifest
from mmclip_shards.storage import local_path
from mmclip_shards.textfiles import read_json, read_text

from mmclip_dist.evaluate.classification import ROC_AT
from mmclip_dist.evaluate.report.numbers import is_known
from mmclip_dist.evaluate.zeroshot import ZeroShot, load_result
from mmclip_dist.run.metrics import METRICS, read_metrics

Row = dict[str, Any]
"""One line of metrics.jsonl."""

_RUN_FILES = (METRICS, "config.yaml", "environment.json")
_ROW_FIELDS = {"step", "samples", "loss", "lr", "temperature", "samples_per_s", "data_wait", "memory_gib"}
_PHASES = (("warmup", "warm-up"), ("train", "MMCLIP"))  # sub-folder of a quick start, its name in the report


@dataclass(frozen=True)
class Phase:
    """One training run. rows: ascending in step; config: the text of config.yaml, settings: its tree.

    None or an empty tree: the file does not exist.
    """

    name: str
    folder: Path
    rows: tuple[Row, ...]
    config: str | None
    settings: dict[str, Any]
    environment: dict[str, Any] | None


@dataclass(frozen=True)
class Job:
    """All that a report shows. stages: (name, seconds); missing: sub-folders of a quick start that hold no run yet. control: the
    result of contrastive training alone for the same processor time, which a quick start makes, and its number of steps."""

    folder: Path
    phases: tuple[Phase, ...]
    missing: tuple[str, ...]
    result: ZeroShot | None
    stages: tuple[tuple[str, float], ...]
    control: tuple[ZeroShot, int] | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all phases, on one step axis."""
        return tuple(row for phase in self.phases for row in phase.rows)

    @property
    def boundary(self) -> int | None:
        """The step at which the warm-up ended and MMCLIP began; None unless both have rows."""
        before, *after = [phase.rows for phase in self.phases if phase.rows] or [()]
        return int(before[-1]["step"]) if after else None


def read_job(folder: Path, stages: Sequence[tuple[str, float]] = ()) -> Job:
    """Read a run folder or a quick-start folder. `stages`, if given, replaces the stages of summary.json.

    ValueError if the folder is neither, or if one of its files cannot be read.
    """
    if (folder / "meta.json").is_file():
        raise ValueError(f"{folder} is a checkpoint; name the run that holds it: {folder.resolve().parent.parent}")
    parts = {name: folder / name for name, _ in _PHASES}
    if _is_run(folder):
        phases, missing = [_read_phase("", folder)], []
    else:
        phases = [_read_phase(title, parts[name]) for name, title in _PHASES if _is_run(parts[name])]
        missing = [name for name in parts if not _is_run(parts[name])]
    if not phases:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
        raise ValueError(
            f"{folder} holds no run (found: {found or 'nothing'}): name the run_dir of a training run, with "
            f"{', '.join(_RUN_FILES)}, or the folder of `mmclip quickstart`, with warmup/ and train/"
        )
    return Job(
        folder, tuple(phases), tuple(missing), _read_result(folder / "zeroshot.json"),
        tuple(stages) or _read_stages(folder / "summary.json"), _read_control(folder),
    )  # fmt: skip


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _RUN_FILES)


def _read_phase(name: str, folder: Path) -> Phase:
    config, environment = folder / "config.yaml", folder / "environment.json"
    text = read_text(config, "restore it, or delete it: the page then does without") if config.is_file() else None
    return Phase(
        name, folder, tuple(_read_rows(folder)), text, _read_settings(config, text) if text else {},
        _read_json(environment) if environment.is_file() else None,
    )  # fmt: skip


def _read_settings(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of sections, found {type(tree).__name__}")
    return tree


def _read_rows(folder: Path) -> list[Row]:
    rows = read_metrics(folder)
    for number, row in enumerate(rows, start=1):
        if lacking := _ROW_FIELDS - set(row):
            raise ValueError(f"{folder / METRICS}, line {number}, lacks {', '.join(sorted(lacking))}; delete that line")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path, "delete it, and the run writes it anew")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, found {type(values).__name__}; delete it")
    return values


def _read_result(path: Path) -> ZeroShot | None:
    if not path.is_file():
        return None
    try:
        result = load_result(path)
        if wrong := [name for name, rates in result.roc.items() if len(rates) != len(ROC_AT) or not all(map(is_known, rates))]:
            raise ValueError(f"the curve of {wrong[0]} is not of {len(ROC_AT)} numbers")
        return result
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of `mmclip evaluate zeroshot` ({error}); run that again") from error


def _read_control(folder: Path) -> tuple[ZeroShot, int] | None:
    result, rows = _read_result(folder / "control.json"), read_metrics(folder / "control")
    return (result, rows[-1]["step"]) if result and rows else None


def _read_stages(path: Path) -> tuple[tuple[str, float], ...]:
    if not path.is_file():
        return ()
    try:
        return tuple((str(stage["name"]), float(stage["seconds"])) for stage in _read_json(path)["stages"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has no usable `stages` ({error}); delete it") from error


def training_seconds(phases: Sequence[Phase]) -> float | None:
    """Time in the training loops, from the samples and the throughput of each row; None where a row has no throughput.

    A phase begins at the last step of the phase before it; a run that starts from a checkpoint logs its first row at most
    `log_every` steps after it.
    """
    seconds, before = 0.0, 0
    rows = [(row, phase.settings.get("log_every", 0)) for phase in phases for row in phase.rows]
    for number, (row, log_every) in enumerate(rows):
        speed, step = row["samples_per_s"], row["step"]
        if not is_known(speed) or speed <= 0 or step <= 0:
            return None
        if number == 0 and log_every:
            before = max(0, step - log_every)
        seconds += (step - before) * (row["samples"] / step) / speed
        before = step
    return seconds if rows else None


def usual_speed(phases: Sequence[Phase]) -> float | None:
    """Median samples/s of the last phase that logged any. The median hides the first row, which includes the start-up."""
    for phase in reversed(phases):
        speeds = [row["samples_per_s"] for row in phase.rows if is_known(row["samples_per_s"])]
        if speeds:
            return float(median(speeds))
    return None


def training_sets(phases: Sequence[Phase]) -> dict[str, str | None]:
    """URL of each source -> "data set/split" by its manifest; None if that cannot be read on this machine."""
    sources = [source for phase in phases for source in (phase.settings.get("data") or {}).get("sources") or ()]
    return {str(source["url"]): _set_name(str(source["url"])) for source in sources}


def _set_name(url: str) -> str | None:
    path = local_path(url)
    if path is None or not path.is_dir():
        return None
    try:
        manifest = load_manifest(url)
    except ValueError:  # the sets may have been deleted or packed again since the run
        return None
    return f"{manifest.dataset}/{manifest.split}"
