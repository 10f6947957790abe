"""Metrics of classification by scikit-learn, and their bootstrap intervals over patients.

Shape letters: N samples, C classes, R resamples. Labels are 1 present, 0 absent, -1 unknown; unknown ones never count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
ROC_AT = np.linspace(0, 1, 101)
"""The false positive rates that a curve is kept at, of whatever number of images."""
_BLOCK = 50  # resamples at once: what they need is a few times 8 bytes x block x N
Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(scores [N], positive [N] bool, weights [R, N]) -> [R]; nan where one kind of sample is missing."""


def per_class_auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every class. scores, labels [N, C] -> [C]; nan for a class without positives or negatives, or
    with a score that is not finite."""
    from sklearn.metrics import roc_auc_score  # a second, which every rank would spend at its start

    return _per_class(roc_auc_score, scores, labels)


def per_class_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of every class. scores, labels [N, C] -> [C]; nan for a class without positives or negatives."""
    from sklearn.metrics import average_precision_score

    return _per_class(average_precision_score, scores, labels)


def per_class_roc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """True positive rate of every class at each of ROC_AT. scores, labels [N, C] -> [C, 101]; nan where `per_class_auc` is."""
    from sklearn.metrics import roc_curve

    def curve(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
        false, true, _ = roc_curve(positive, scores)
        return np.interp(ROC_AT, false, true).round(4)

    return _per_class(curve, scores, labels, (len(ROC_AT),))


def _per_class(
    metric: Callable[[np.ndarray, np.ndarray], float | np.ndarray], scores: np.ndarray, labels: np.ndarray,
    shape: tuple[int, ...] = (),
) -> np.ndarray:  # fmt: skip
    found = np.full((labels.shape[1], *shape), np.nan)
    for column in range(labels.shape[1]):
        known = labels[:, column] >= 0
        positive = labels[known, column] == 1
        finite = np.isfinite(scores[known, column]).all()  # a run that diverged gives nan, and has no AUC
        if positive.any() and not positive.all() and finite:
            found[column] = metric(positive, scores[known, column])
    return found


# -- Thresholds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtThreshold:
    """A class at a threshold: a sample counts as positive if its score is at least that."""

    threshold: float
    f1: float
    accuracy: float
    balanced_accuracy: float
    tpr: float
    tnr: float
    ppv: float
    npv: float
    mcc: float


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest F1, the lowest of equal ones. scores, labels [N]; nan without positives or negatives."""
    from sklearn.metrics import precision_recall_curve

    known = labels >= 0
    positive = labels[known] == 1
    if not positive.any() or positive.all():
        return float("nan")
    precision, recall, thresholds = precision_recall_curve(positive, scores[known])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[np.argmax(f1[:-1])])  # the last point has no threshold


def at_threshold(scores: np.ndarray, labels: np.ndarray, threshold: float) -> AtThreshold:
    """scores, labels [N]. Ratios without a denominator are 0, as scikit-learn gives them."""
    from sklearn import metrics

    known = labels >= 0
    positive, found = labels[known] == 1, scores[known] >= threshold
    kinds = [False, True]
    tn, fp, fn, tp = metrics.confusion_matrix(positive, found, labels=kinds).ravel()
    tpr, tnr = tp / max(tp + fn, 1), tn / max(tn + fp, 1)
    return AtThreshold(
        threshold=threshold, f1=float(metrics.f1_score(positive, found, zero_division=0.0)),
        accuracy=float(metrics.accuracy_score(positive, found)), balanced_accuracy=float((tpr + tnr) / 2),
        tpr=float(tpr), tnr=float(tnr), ppv=float(tp / max(tp + fp, 1)), npv=float(tn / max(tn + fn, 1)),
        mcc=float(metrics.matthews_corrcoef(positive, found)),
    )  # fmt: skip


# -- Intervals --------------------------------------------------------------------------------------------------------


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`roc_auc_score` of weighted samples, for all resamples at once. Ties count a half."""
    positives, negatives = _by_score(scores, positive, weights)
    below = np.cumsum(negatives, 1) - negatives / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((positives * below).sum(1) / (positives.sum(1) * negatives.sum(1)))


def weighted_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`average_precision_score` of weighted samples, for all resamples at once."""
    positives, negatives = (kind[:, ::-1] for kind in _by_score(scores, positive, weights))
    right, chosen = np.cumsum(positives, 1), np.cumsum(positives + negatives, 1)
    total = positives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (positives * right / np.maximum(chosen, 1e-12)).sum(1) / total
    return np.where(negatives.sum(1) > 0, found, np.nan)


def weighted_f1(threshold: float) -> Weighted:
    """F1 at a fixed threshold; nan at nan."""

    def metric(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if np.isnan(threshold):
            return np.full(len(weights), np.nan)
        found = scores >= threshold
        twice = 2 * weights @ (found & positive)
        return np.asarray(twice / np.maximum(weights @ found.astype(float) + weights @ positive.astype(float), 1e-12))

    return metric


def weighted_accuracy(threshold: float) -> Weighted:
    """Accuracy at a fixed threshold; nan at nan."""

    def metric(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if np.isnan(threshold):
            return np.full(len(weights), np.nan)
        return np.asarray(weights @ ((scores >= threshold) == positive) / np.maximum(weights.sum(1), 1e-12))

    return metric


def _by_score(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives at each of the S different scores, ascending. -> two arrays [R, S]."""
    if not len(scores):
        return np.zeros((len(weights), 1)), np.zeros((len(weights), 1))
    order = np.argsort(scores, kind="stable")
    ascending, up = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    sorted_weights = weights[:, order].astype(np.float64)
    return np.add.reduceat(sorted_weights * up, starts, 1), np.add.reduceat(sorted_weights * ~up, starts, 1)


def macro(metric: Weighted, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """scores, labels [N, C], weights [R, N] -> mean over the classes that have both kinds [R]."""
    return _mean_of_known(_columns([metric] * labels.shape[1], scores, labels, weights))


def _columns(metrics: Sequence[Weighted], scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """-> [C, R]"""
    known = labels >= 0
    return np.stack([
        metric(scores[known[:, c], c], labels[known[:, c], c] == 1, weights[:, known[:, c]]) for c, metric in enumerate(metrics)
    ])  # fmt: skip


def _mean_of_known(found: np.ndarray) -> np.ndarray:
    """[C, R] -> mean over the classes that are not nan [R]; nan where none is known."""
    known = ~np.isnan(found)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, found, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan))


def resampled(patients: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """Weights [block, N] of the samples in bootstrap resamples of patients [N]: images of one patient are drawn together."""
    generator = np.random.Generator(np.random.PCG64(seed))
    names, number = np.unique(patients, return_inverse=True)
    for first in range(0, resamples, _BLOCK):
        counts = [
            np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
            for _ in range(min(_BLOCK, resamples - first))
        ]
        yield np.stack(counts)[:, number]


@dataclass(frozen=True)
class Intervals:
    """95% percentile bootstrap intervals over patients: of every class [C], and of the mean of the classes. (nan, nan) where
    no resample has both kinds."""

    classes: list[tuple[float, float]]
    macro: tuple[float, float]


def intervals(
    metrics: Mapping[str, Sequence[Sequence[Weighted]]], scores: np.ndarray, labels: np.ndarray, patients: np.ndarray,
    *, resamples: int = RESAMPLES, seed: int = 0,
) -> dict[str, Intervals]:  # fmt: skip
    """Of some metrics, each given for every scoring and class. scores [S, N, C]: scorings of the same samples, whose mean counts;
    labels [N, C]; patients [N].

    A class without positives (or negatives) in a resample is left out of that resample's mean.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for weights in resampled(patients, resamples=resamples, seed=seed):
        for name, of_scorings in metrics.items():
            each = [_columns(of_classes, own, labels, weights) for of_classes, own in zip(of_scorings, scores, strict=True)]
            found[name].append(np.mean(each, 0))
    blocks = {name: np.concatenate(parts, 1) for name, parts in found.items()}  # [C, R]
    return {
        name: Intervals([percentile_interval(row) for row in block], percentile_interval(_mean_of_known(block)))
        for name, block in blocks.items()
    }


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """95% of the known of some resampled values [R]; (nan, nan) without any."""
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def auc_intervals(
    scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Intervals:
    """Of the AUC. scores, labels [N, C], patients [N]."""
    metrics = {"auroc": [[weighted_auc] * labels.shape[1]]}
    return intervals(metrics, scores[None], labels, patients, resamples=resamples, seed=seed)["auroc"]
