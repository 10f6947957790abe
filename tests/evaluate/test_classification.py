"""Metrics of classification: against scikit-learn, on ties and weights, thresholds, and intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, auc, average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from mmclip_dist.evaluate.classification import (
    ROC_AT,
    at_threshold,
    best_threshold,
    intervals,
    per_class_auc,
    per_class_precision,
    per_class_roc,
    resampled,
    weighted_accuracy,
    weighted_auc,
    weighted_f1,
    weighted_precision,
)
from mmclip_dist.evaluate.result import measured


def case(seed: int = 0, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    positive = random.random(count) < 0.3
    return np.round(random.normal(size=count) + positive, 1), positive  # with ties


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (weighted_auc, roc_auc_score),
        (weighted_precision, average_precision_score),
        (weighted_f1(0.4), lambda y, s, sample_weight: f1_score(y, s >= 0.4, sample_weight=sample_weight)),
        (weighted_accuracy(0.4), lambda y, s, sample_weight: accuracy_score(y, s >= 0.4, sample_weight=sample_weight)),
    ],
)
def test_weighted_metrics_are_those_of_scikit_learn(ours, theirs) -> None:
    scores, positive = case()
    weights = np.random.default_rng(1).integers(0, 4, size=(6, len(scores)))
    wanted = [theirs(positive, scores, sample_weight=row) for row in weights]
    assert ours(scores, positive, weights) == pytest.approx(wanted, abs=1e-12)


def test_a_resample_of_one_kind_has_no_value() -> None:
    scores, positive = case()
    for metric in (weighted_auc, weighted_precision):
        assert np.isnan(metric(scores, positive, np.stack([positive, ~positive]))).all()


def test_a_curve_has_the_area_of_its_auc_and_no_class_without_negatives_has_one() -> None:
    generator = np.random.default_rng(0)
    labels = np.stack([generator.integers(0, 2, 400), np.ones(400, int)], 1)
    scores = labels * 0.7 + generator.normal(size=labels.shape)
    curve, none = per_class_roc(scores, labels)
    assert len(curve) == len(ROC_AT) and curve[-1] == 1 and (np.diff(curve) >= 0).all() and np.isnan(none).all()
    assert auc(ROC_AT, curve) == pytest.approx(per_class_auc(scores, labels)[0], abs=0.01)
    assert per_class_roc(np.array([[0.9], [0.1]]), np.array([[1], [0]]))[0].tolist() == [1.0] * 101  # found without a false alarm


def test_scores_that_are_not_finite_have_no_figure() -> None:
    labels = np.array([[1, 1], [0, 0], [1, 0]])
    scores = np.array([[0.1, np.nan], [0.0, 0.5], [0.9, 0.2]])
    assert per_class_auc(scores, labels)[0] == 1 and np.isnan(per_class_auc(scores, labels)[1])
    assert np.isnan(per_class_precision(scores, labels)[1])
    with pytest.raises(ValueError, match="not finite: it has diverged"):
        measured(("A", "B"), np.full((1, 3, 2), np.nan), labels, np.arange(3))


def test_the_threshold_is_the_one_with_the_best_f1() -> None:
    scores, positive = case()
    labels = np.where(np.arange(200) % 10, positive, -1)  # every tenth is unknown
    known = labels >= 0
    found = best_threshold(scores, labels)
    tried = {value: f1_score(positive[known], scores[known] >= value) for value in np.unique(scores)}
    assert tried[found] == max(tried.values())
    at = at_threshold(scores, labels, found)
    assert at.f1 == pytest.approx(tried[found])
    assert at.mcc == pytest.approx(matthews_corrcoef(positive[known], scores[known] >= found))
    assert at.balanced_accuracy == pytest.approx((at.tpr + at.tnr) / 2)
    assert np.isnan(best_threshold(scores, np.zeros(200, int)))


def test_patients_are_drawn_whole() -> None:
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    weights = np.concatenate(list(resampled(patients, resamples=120)))
    assert weights.shape == (120, 6)
    for name in "abc":
        assert (weights[:, patients == name] == weights[:, patients == name][:, :1]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_the_mean_of_several_scorings_has_an_interval_of_its_own() -> None:
    scores, positive = case()
    labels = positive.astype(int)[:, None]
    scorings = np.stack([scores[:, None], -scores[:, None]])
    found = intervals({"auroc": [[weighted_auc]] * 2}, scorings, labels, np.arange(200))["auroc"]
    assert found.macro == found.classes[0] == pytest.approx((0.5, 0.5))  # one is right where the other is wrong


# -- The figures of a result ------------------------------------------------------------------------------------------


def test_figures_at_thresholds_of_validation_and_of_the_test_itself() -> None:
    scores, positive = case()
    labels, patients = np.stack([positive, np.zeros(200)], 1).astype(int), np.arange(200) // 2
    both = np.stack([scores, scores], 1)[None]
    plain = measured(("A", "B"), both, labels, patients)
    assert plain.f1_val_threshold is None and plain.acc_val_threshold is None and "--validation URL" in plain.threshold_from
    assert plain.left_out == {"B": "no positives"} and set(plain.auroc) == {"A"} and "threshold" not in plain.rows[0]
    own, own_positive = case(seed=7)
    own_labels = np.stack([own_positive, own_positive], 1).astype(int)
    found = measured(("A", "B"), both, labels, patients, validation=(np.stack([own, own], 1)[None], own_labels))
    threshold = best_threshold(own, own_positive.astype(int))
    assert found.thresholds == {"A": threshold} and found.rows[0]["threshold"] == threshold
    f1 = f1_score(positive, scores >= threshold)
    assert found.f1_val_threshold == pytest.approx({"A": f1, "macro": f1}) and found.rows[0]["f1"] == f1
    assert found.f1_max_test["A"] == max(f1_score(positive, scores >= value) for value in np.unique(scores))
    assert found.f1_max_test["A"] > found.f1_val_threshold["A"] or threshold == best_threshold(scores, positive.astype(int))
    for metric in ("auroc", "auprc", "f1_val_threshold", "acc_val_threshold", "f1_max_test", "acc_at_f1_max"):
        low, high = found.ci95[metric]["A"]
        value = getattr(found, metric)["A"]
        assert low < value < high and found.ci95[metric]["macro"] == (low, high)


def test_a_class_that_validation_cannot_choose_for_is_named() -> None:
    scores, positive = case()
    labels = positive.astype(int)[:, None]
    found = measured(("A",), scores[None, :, None], labels, np.arange(200), validation=(scores[None, :, None], labels * 0))
    assert found.f1_val_threshold == {} and np.isnan(found.ci95["f1_val_threshold"]["A"]).all()
    assert "none for A, which has no positives or no negatives there" in found.threshold_from


def test_classes_that_exclude_each_other_have_one_accuracy() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6], [0.4, 0.3]])
    labels = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    found = measured(("A", "B"), scores[None], labels, np.arange(4), exclusive=True)
    assert found.accuracy == 0.75 and found.ci95["accuracy"]["macro"][1] == 1
    with pytest.raises(ValueError, match="exactly one class an image, but 1 images have none or several"):
        measured(("A", "B"), scores[None], np.array([[1, 1], [0, 1], [0, 1], [1, 0]]), np.arange(4), exclusive=True)
