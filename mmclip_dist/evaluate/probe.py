"""Linear probe: logistic regression on frozen features, fitted on shares of the labels, C chosen on validation patients."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from mmclip_shards.home import home
from mmclip_shards.manifest import manifest_hash
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import canonical_json
from mmclip_shards.storage import write_atomic

from mmclip_dist.evaluate import shared
from mmclip_dist.evaluate.classification import per_class_auc
from mmclip_dist.evaluate.encoders import Encoder
from mmclip_dist.evaluate.protocol import Columns
from mmclip_dist.evaluate.reading import Known, LabelledImages

SHARES = (0.01, 0.1, 1.0)
SUBSETS = {0.01: 5, 0.1: 3, 1.0: 1}  # a few labels are a matter of luck: the mean over some subsets, the same for every model
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # C of logistic regression on standardised features
_VERSION = 1  # of the cache's files


@dataclass(frozen=True)
class Featured:
    """Frozen features [N, D] of labelled images; labels [N, C]: 1, 0, or -1 for unknown; patients [N]."""

    features: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    undecodable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probed:
    """Scores of the images of two sets by the models of one share of the labels, one for each subset of the patients.

    test [S, N, C], validation [S, M, C]; n_train: labelled images of each subset; strengths: the C of each; constant: classes
    that some subset has only one kind of, whose scores are 0 there.
    """

    test: np.ndarray
    validation: np.ndarray
    n_train: tuple[int, ...]
    strengths: tuple[float, ...]
    constant: tuple[int, ...]


def probe(train: Featured, validation: Featured, test: np.ndarray, share: float) -> Probed:
    """Fit on a share of the patients of `train`. test: features [N, D]. C is that of the best macro AUC on `validation`, for each
    subset. Features are standardised by those of the whole training set."""
    middle, spread = train.features.mean(0), train.features.std(0) + 1e-6
    fitted, chosen, tested = ((features - middle) / spread for features in (train.features, validation.features, test))
    on_test, on_validation, counts, strengths, constant = [], [], [], [], set()
    for subset in range(SUBSETS[share]):
        rows = patients_share(train.patients, share, subset)
        trials = []
        for strength in STRENGTHS:
            models = [_fit(fitted[rows], train.labels[rows, c], strength) for c in range(train.labels.shape[1])]
            scores = np.stack([_decide(model, chosen) for model in models], 1)
            trials.append((np.nanmean(per_class_auc(scores, validation.labels)), strength, models, scores))
        _, strength, models, scores = max(trials, key=lambda trial: trial[0])
        on_test.append(np.stack([_decide(model, tested) for model in models], 1))
        on_validation.append(scores)
        counts.append(len(rows))
        strengths.append(strength)
        constant |= {column for column, model in enumerate(models) if model is None}
    return Probed(np.stack(on_test), np.stack(on_validation), tuple(counts), tuple(strengths), tuple(sorted(constant)))


def patients_share(patients: np.ndarray, share: float, subset: int) -> np.ndarray:
    """Rows of whole patients that make up about a share of all: a function of the patients, the share and the subset's number."""
    names = np.unique(patients)
    drawn = np.random.default_rng(subset).permutation(names)[: max(1, round(share * len(names)))]
    return np.flatnonzero(np.isin(patients, drawn))


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> object | None:
    from sklearn.linear_model import LogisticRegression

    known = labels >= 0
    if len(np.unique(labels[known])) < 2:
        return None  # a small subset may have no positive
    return LogisticRegression(C=strength, max_iter=300).fit(features[known], labels[known])


def _decide(model: object | None, features: np.ndarray) -> np.ndarray:
    return np.zeros(len(features)) if model is None else np.asarray(model.decision_function(features))  # type: ignore[attr-defined]


# -- Features ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "mmclip" / "features"


def featured(
    encoder: Encoder, sets: Sequence[ShardReader], columns: Sequence[Columns], classes: Sequence[str], cache: Path,
    report: Callable[[int, int], None] | None = None,
) -> Featured:  # fmt: skip
    """Features of all images of some sets, from the cache if they were made before by the same weights."""
    made = [_of_set(encoder, reader, cache, report) for reader in sets]
    labels = []
    for one, own, reader in zip(made, columns, sets, strict=True):
        table = np.full((len(one.labels), len(classes)), -1)
        for name, column in own.labels.items():
            table[:, column] = one.labels[:, reader.manifest.labels.index(name)]
        labels.append(table)
    return Featured(
        np.concatenate([one.features for one in made]), np.concatenate(labels), np.concatenate([one.patients for one in made]),
        tuple(key for one in made for key in one.undecodable),
    )  # fmt: skip


def _of_set(encoder: Encoder, reader: ShardReader, cache: Path, report: Callable[[int, int], None] | None) -> Featured:
    """With all labels of the set. The file's name says what it depends on: weights, content of the set, kind of features."""
    parts = [_VERSION, encoder.sha256, manifest_hash(reader.manifest), encoder.features_are]
    path = cache / f"{hashlib.sha256(canonical_json(parts)).hexdigest()}.npz"
    if shared.by_first(path.is_file, "looking for features"):
        return shared.by_first(lambda: _stored(path), "reading features")
    names = reader.manifest.labels
    images = LabelledImages([reader], [Columns({name: number for number, name in enumerate(names)}, ())], names)
    with encoder.evaluating():
        rows = images.all(
            encoder, lambda pixels: (encoder.features(pixels),), lambda known, found: (replace(known, boxes=[]), found[0]), report
        )
    known = Known.of_all([each for each, _ in rows])
    features = np.concatenate([found for _, found in rows])
    made = Featured(features, known.labels, np.array(known.patients), tuple(known.undecodable))
    shared.by_first(lambda: _store(path, made), "writing features")
    return made


def _stored(path: Path) -> Featured:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Featured(stored["features"], stored["labels"], stored["patients"], tuple(stored["undecodable"].tolist()))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"the features in {path} are damaged ({error}): delete that file") from error


def _store(path: Path, made: Featured) -> None:
    buffer = BytesIO()
    np.savez(buffer, **vars(replace(made, undecodable=np.array(made.undecodable, dtype=str))))  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(str(path), buffer.getvalue())
