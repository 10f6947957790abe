"""The result of an evaluation: figures, JSON, the columns of RadHarmony's harness as CSV, and rows of a table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from mmclip_shards.storage import write_atomic

from mmclip_dist.evaluate.classification import (
    AtThreshold,
    Weighted,
    at_threshold,
    best_threshold,
    intervals,
    per_class_auc,
    per_class_precision,
    per_class_roc,
    percentile_interval,
    resampled,
    weighted_accuracy,
    weighted_auc,
    weighted_f1,
    weighted_precision,
)

MACRO = "macro"
HARNESS = ("label", "n_train", "fold", "seed", "bootstrap", "auroc", "auprc", "f1", "accuracy", "balanced_accuracy", "tpr", "tnr",
           "ppv", "npv", "mcc", "threshold")  # fmt: skip
"""Columns of RadHarmony's results.csv. The figures at a threshold are at the one from validation, and empty without one."""

Figures = dict[str, float]
"""Of the classes that can be measured, and their mean, "macro"."""


@dataclass(frozen=True)
class Subject:
    """What was evaluated on what. dataset, split_name: of the sets' manifests, sets: both, for each; leak: see `leaks.check`;
    notes: lines for the reader."""

    task: str
    model: str
    checkpoint_sha256: str
    protocol: str
    source: str
    dataset: str
    split_name: str
    sets: tuple[str, ...]
    n: int
    n_patients: int
    undecodable: tuple[str, ...] = ()
    leak: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Figures of classification. left_out: class -> why it has none.

    f1_val_threshold, acc_val_threshold: at each class's threshold with the best F1 on the validation set, None without one;
    f1_max_test, acc_at_f1_max: at the threshold that is best on this very test set, so they flatter, and stand beside published
    ones only. accuracy: how often the class with the highest score is right, where an image has exactly one. ci95: metric ->
    class -> interval. roc: class, or "macro" -> true positive rates at `classification.ROC_AT`.
    """

    auroc: Figures
    auroc_macro: float
    auprc: Figures
    auprc_macro: float
    f1_val_threshold: Figures | None
    acc_val_threshold: Figures | None
    thresholds: Figures | None
    threshold_from: str
    f1_max_test: Figures
    acc_at_f1_max: Figures
    accuracy: float | None
    ci95: dict[str, dict[str, tuple[float, float]]]
    roc: dict[str, list[float]]
    left_out: dict[str, str]
    rows: tuple[dict[str, Any], ...]


NO_VALIDATION = "none: without a validation set (--validation URL) no threshold is chosen, so F1 and accuracy at one are absent"


def measured(
    classes: Sequence[str], scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, *,
    validation: tuple[np.ndarray, np.ndarray] | None = None, threshold_from: str = NO_VALIDATION, exclusive: bool = False,
    n_train: int = 0,
) -> Measured:  # fmt: skip
    """Figures of one or several scorings [S, N, C] of the same samples (means over the scorings). labels [N, C], patients [N].

    validation: scores [S, M, C] and labels [M, C] of other patients. ValueError if no class has positives and negatives, or if
    classes that should exclude each other do not.
    """
    aucs = np.array([per_class_auc(own, labels) for own in scores])
    known = ~np.isnan(aucs[0])
    if not known.any():
        if not np.isfinite(scores).all():
            raise ValueError("the model gives scores that are not finite: it has diverged; evaluate an earlier checkpoint")
        raise ValueError("no class has both positive and negative samples here: evaluate on a larger labelled split")
    precisions = np.array([per_class_precision(own, labels) for own in scores])
    columns = np.flatnonzero(known)
    names = [classes[column] for column in columns]
    test_best = _thresholds(scores, labels, columns)
    chosen = None if validation is None else _thresholds(*validation, columns)
    if chosen is not None:
        for row, name in zip(np.isnan(chosen).T, names, strict=True):
            if row.any():
                threshold_from += f"; none for {name}, which has no positives or no negatives there"
    at_best = [[at_threshold(own[:, c], labels[:, c], t) for c, t in zip(columns, row, strict=True)]
               for own, row in zip(scores, test_best, strict=True)]  # fmt: skip
    at_chosen = [[None if np.isnan(t) else at_threshold(own[:, c], labels[:, c], t) for c, t in zip(columns, row, strict=True)]
                 for own, row in zip(scores, chosen, strict=True)] if chosen is not None else None  # fmt: skip
    right = _top_right(scores, labels) if exclusive else None
    ci95 = _intervals(names, scores[:, :, columns], labels[:, columns], patients, test_best, chosen)
    if right is not None:
        of_resamples = np.concatenate([weights @ right / weights.sum(1) for weights in resampled(patients)])
        ci95["accuracy"] = {MACRO: percentile_interval(of_resamples)}
    return Measured(
        auroc=_named(names, aucs[:, columns].mean(0)), auroc_macro=float(aucs[:, columns].mean()),
        auprc=_named(names, precisions[:, columns].mean(0)), auprc_macro=float(precisions[:, columns].mean()),
        f1_val_threshold=_figures(names, at_chosen, "f1"), acc_val_threshold=_figures(names, at_chosen, "accuracy"),
        thresholds=None if chosen is None else _named(names, chosen.mean(0)), threshold_from=threshold_from,
        f1_max_test=_figures(names, at_best, "f1") or {}, acc_at_f1_max=_figures(names, at_best, "accuracy") or {},
        accuracy=None if right is None else float(right.mean()), ci95=ci95,
        roc=roc_curves(names, np.mean([per_class_roc(own[:, columns], labels[:, columns]) for own in scores], 0)),
        left_out={name: _why(labels[:, c]) for c, name in enumerate(classes) if not known[c]},
        rows=tuple(_row(name, n_train, subset, aucs[subset, c], precisions[subset, c],
                        at_chosen[subset][place] if at_chosen is not None else None)
                   for subset in range(len(scores)) for place, (c, name) in enumerate(zip(columns, names, strict=True))),
    )  # fmt: skip


def _thresholds(scores: np.ndarray, labels: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.array([[best_threshold(own[:, c], labels[:, c]) for c in columns] for own in scores])


def _named(names: Sequence[str], values: np.ndarray) -> Figures:
    return {name: float(value) for name, value in zip(names, values, strict=True) if not np.isnan(value)}


def roc_curves(names: Sequence[str], rates: np.ndarray) -> dict[str, list[float]]:
    """True positive rates [C, 101] by class, and their mean."""
    return dict(zip([*names, MACRO], [*rates.tolist(), rates.mean(0).round(4).tolist()], strict=True))


def _figures(names: Sequence[str], found: Sequence[Sequence[AtThreshold | None]] | None, what: str) -> Figures | None:
    """Mean over the scorings of each class, and over the classes."""
    if found is None:
        return None
    values = np.array([[np.nan if one is None else getattr(one, what) for one in row] for row in found]).mean(0)
    named = _named(names, values)
    return named | ({MACRO: float(np.mean(list(named.values())))} if named else {})


def _intervals(
    names: Sequence[str], scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, best: np.ndarray,
    chosen: np.ndarray | None,
) -> dict[str, dict[str, tuple[float, float]]]:  # fmt: skip
    plain: dict[str, Weighted] = {"auroc": weighted_auc, "auprc": weighted_precision}
    metrics = {name: [[metric] * len(names)] * len(scores) for name, metric in plain.items()}
    fixed = {"f1_max_test": (weighted_f1, best), "acc_at_f1_max": (weighted_accuracy, best)}
    if chosen is not None:
        fixed |= {"f1_val_threshold": (weighted_f1, chosen), "acc_val_threshold": (weighted_accuracy, chosen)}
    metrics |= {name: [[make(t) for t in row] for row in table] for name, (make, table) in fixed.items()}
    found = intervals(metrics, scores, labels, patients)
    return {name: dict(zip(names, one.classes, strict=True)) | {MACRO: one.macro} for name, one in found.items()}


def _top_right(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the scorings in which the class with the highest score is the image's own [N]."""
    odd = int(((labels == 1).sum(1) != 1).sum())
    if odd:
        raise ValueError(f"the protocol needs exactly one class an image, but {odd} images have none or several: pack that list")
    return np.asarray(np.mean([own.argmax(1) == labels.argmax(1) for own in scores], 0))


def _why(labels: np.ndarray) -> str:
    lacking = [name for name, value in (("positives", 1), ("negatives", 0)) if not (labels == value).any()]
    return f"no {' and no '.join(lacking)}" if lacking else "scores that are not finite"


def _row(label: str, n_train: int, seed: int, auroc: float, auprc: float, at: AtThreshold | None) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "n_train": n_train, "fold": 0, "seed": seed, "auroc": auroc, "auprc": auprc}
    return row | (asdict(at) if at is not None else {})


# -- Files ------------------------------------------------------------------------------------------------------------


def document(subject: Subject, more: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON holds. nan is null there: JSON has no nan."""
    return _plain({**asdict(subject), **more})


def figures(found: Measured) -> dict[str, Any]:
    """A `Measured` without the rows of the CSV."""
    return {entry.name: getattr(found, entry.name) for entry in fields(found) if entry.name != "rows"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def save(path: Path, content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the JSON, and beside it the CSV if there are rows."""
    write_atomic(str(path), (json.dumps(content, indent=2) + "\n").encode())
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, HARNESS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(str(path.with_suffix(".csv")), text.getvalue().encode())
