"""Arms beside the control on the same patients: means over seeds, paired differences and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmclip_dist.evaluate.classification import macro, weighted_auc
from mmclip_dist.evaluate.retrieval import RECALL_AT

RESAMPLES = 1000
Arrays = Mapping[str, np.ndarray]
Statistic = Callable[[Arrays, np.ndarray], np.ndarray]
"""(arrays of `measures.measure`, weights [R, N] of the samples) -> [R]; nan where it is not measured."""


def macro_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """scores [N, C], labels [N, C] (1, 0, -1 unknown), weights [R, N] -> mean over the classes that have both kinds [R]."""
    return macro(weighted_auc, scores, labels, weights)


def _probe(share: str) -> Statistic:
    def statistic(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
        subsets = arrays[f"probe_{share}"]
        return np.asarray(np.mean([macro_auc(scores, arrays["labels"], weights) for scores in subsets], 0))

    return statistic


def _recall(name: str, column: int) -> Statistic:
    def statistic(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
        if name not in arrays:
            return np.full(len(weights), np.nan)
        return np.asarray(weights @ arrays[name][:, column].astype(float) / weights.sum(1))

    return statistic


def _pointed(name: str) -> Statistic:
    """The mean over findings of each disease, then over diseases."""

    def statistic(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
        own = weights[:, arrays["pointed_sample"].astype(int)]
        disease = arrays["pointed_disease"]
        if not len(disease):  # a set without boxes
            return np.full(len(weights), np.nan)
        means = [own[:, disease == d] @ arrays[name][disease == d] / own[:, disease == d].sum(1) for d in np.unique(disease)]
        return np.asarray(np.mean(means, 0))

    return statistic


def _mean_of(name: str) -> Statistic:
    def statistic(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
        if name not in arrays:
            return np.full(len(weights), np.nan)
        known = ~np.isnan(arrays[name])
        return np.asarray(weights[:, known] @ arrays[name][known] / weights[:, known].sum(1))

    return statistic


def _guessed(column: int) -> Statistic:
    def statistic(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
        if "guessed" not in arrays:
            return np.full(len(weights), np.nan)
        return np.asarray(weights @ arrays["guessed"][:, column] / (weights @ arrays["masked_tokens"]))

    return statistic


METRICS: dict[str, Statistic] = {
    "zero-shot AUC": lambda arrays, weights: macro_auc(arrays["zeroshot"], arrays["labels"], weights),
    "probe 1%": _probe("0.01"),
    "probe 10%": _probe("0.1"),
    "probe 100%": _probe("1"),
    **{f"image to text R@{k}": _recall("image_to_text", column) for column, k in enumerate(RECALL_AT)},
    **{f"text to image R@{k}": _recall("text_to_image", column) for column, k in enumerate(RECALL_AT)},
    "pointing game": _pointed("pointed"),
    "attention in boxes": _pointed("attention_inside"),
    "error in boxes": _mean_of("error_inside"),
    "error elsewhere": _mean_of("error_elsewhere"),
    "entities, right image": _guessed(0),
    "entities, another image": _guessed(1),
    "entities, no image": _guessed(2),
}
"""Name -> macro or mean statistic over held-out samples."""


@dataclass(frozen=True)
class Compared:
    """A metric of an arm. mean: over the seeds; seeds: each one's value; difference and interval: to the control on the same
    patients, seed by seed. The interval is the 95% percentile bootstrap over patients and over seeds."""

    mean: float
    seeds: tuple[float, ...]
    difference: float
    interval: tuple[float, float]


def compare(arm: Sequence[Arrays], control: Sequence[Arrays]) -> dict[str, Compared]:
    """Both by seed, in the same order of seeds; the patients are the same in all."""
    patients = control[0]["patients"]
    for arrays in (*arm, *control):
        if not np.array_equal(arrays["patients"], patients):
            raise ValueError("the runs were measured on different patients: delete their measures and measure again")
    weights, drawn = resamples(patients, len(control))
    found = {}
    for name, statistic in METRICS.items():
        ours, theirs = (np.stack([statistic(arrays, weights) for arrays in arrays_of]) for arrays_of in (arm, control))
        own, other = ours[:, 0], theirs[:, 0]
        if np.isnan(own).any():
            continue
        differences = np.take_along_axis((ours - theirs)[:, 1:], drawn.T, 0).mean(0)
        low, high = np.percentile(differences, [2.5, 97.5]) if not np.isnan(differences).any() else (np.nan, np.nan)
        found[name] = Compared(
            float(own.mean()), tuple(map(float, own)), float((own - other).mean()), (float(low), float(high))
        )
    return found


def resamples(patients: np.ndarray, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the samples [1 + R, N], of which the first row is all ones, and seeds drawn with replacement [R, seeds]."""
    generator = np.random.default_rng(0)
    names, number = np.unique(patients, return_inverse=True)
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, len(patients))), counts[:, number]])
    return weights, generator.integers(seeds, size=(RESAMPLES, seeds))
