"""The tasks of `mmclip evaluate`: a model, sets and a protocol -> a document for JSON, rows for CSV, and a table to print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmclip_shards.manifest import find_split, load_manifest
from mmclip_shards.reader import ShardReader

from mmclip_dist.evaluate import leaks, shared
from mmclip_dist.evaluate.classification import per_class_auc, percentile_interval, resampled
from mmclip_dist.evaluate.encoders import Encoder, Trained
from mmclip_dist.evaluate.finetune import FineTuning, Recipe
from mmclip_dist.evaluate.pointing import TEMPERATURE, THRESHOLDS, Pointed, pointed
from mmclip_dist.evaluate.probe import SHARES, Featured, Probed, featured, probe
from mmclip_dist.evaluate.protocol import Columns, Protocol, check_split, matched, prompts_hash
from mmclip_dist.evaluate.reading import BATCH, Known, LabelledImages
from mmclip_dist.evaluate.result import MACRO, NO_VALIDATION, Measured, Subject, document, figures, measured
from mmclip_dist.evaluate.retrieval import RECALL_AT, hits, ranks
from mmclip_dist.evaluate.zeroshot import Evaluation, prompt_directions
from mmclip_dist.fit import Place

Report = Callable[[int, int], None]
_POINTING = ("hit", "attention", "iou", "cnr", "box_share")


@dataclass(frozen=True)
class Request:
    """A model on the test split of some sets, by a protocol. validation, train: URLs of other splits, or of sets with them."""

    encoder: Encoder
    urls: Sequence[str]
    protocol: Protocol
    validation: str | None = None
    train: str | None = None
    allow_leak: bool = False
    report: Report | None = None

    def test(self) -> list[ShardReader]:
        split = self.protocol.split or "test"
        readers = [_open(url, split) for url in self.urls]
        for reader in readers:
            check_split(self.protocol, reader.manifest, str(reader.url))
        return readers

    def leak(self, sets: Sequence[ShardReader]) -> dict[str, Any]:
        return leaks.check(
            sets, self.encoder.trained_on, self.encoder.seen, dataset=self.protocol.dataset, allow=self.allow_leak
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a task found. table: its columns, then its rows."""

    document: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    table: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def zeroshot(request: Request) -> Outcome:
    """Classification by prompts."""
    encoder, protocol, sets = request.encoder, request.protocol, request.test()
    evaluation = Evaluation(sets, protocol, encoder.prompts)
    validation, told = None, NO_VALIDATION
    if request.validation is not None:
        reader = _open(request.validation, "val")
        _disjoint(request, [reader], sets, "the validation and the test set")
        validation, told = _validated(request, reader, evaluation.classes), _chosen_on(reader)
    leak = request.leak(sets)
    known, scores = _scored(evaluation, request)
    found = shared.by_first(
        lambda: measured(
            evaluation.classes, scores[None], known.labels, np.array(known.patients), validation=validation, threshold_from=told,
            exclusive=protocol.exclusive,
        ), "measuring",
    )  # fmt: skip
    subject = _subject("zeroshot", request, sets, known, leak, _unknown(protocol, evaluation.unknown))
    more = {"classes": evaluation.classes, "prompts_hash": prompts_hash(evaluation.prompts), **figures(found)}
    notes = (*subject.notes, *_left_out(found, known))
    return Outcome(document(subject, more), found.rows, _table(protocol, [("", found)]), notes)


def _scored(evaluation: Evaluation, request: Request) -> tuple[Known, np.ndarray]:
    scored = evaluation.scored(request.encoder, request.report)
    return Known.of_all([batch.known for batch in scored]), np.concatenate([batch.scores for batch in scored])


def _validated(request: Request, reader: ShardReader, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [1, M, C] and labels [M, C] of the validation set, for the classes of the test set."""
    evaluation = Evaluation([reader], _any_split(request.protocol), request.encoder.prompts)
    known, scores = _scored(evaluation, request)
    labels = np.full((len(scores), len(classes)), -1)
    aligned = np.zeros((len(scores), len(classes)), scores.dtype)
    for column, name in enumerate(classes):
        if name in evaluation.classes:
            own = evaluation.classes.index(name)
            labels[:, column], aligned[:, column] = known.labels[:, own], scores[:, own]
    return aligned[None], labels


def linear_probe(request: Request, cache: Path) -> Outcome:
    """Logistic regression on frozen features, on 1, 10 and 100% of the labels; C and thresholds from validation."""
    encoder, protocol, sets = request.encoder, request.protocol, request.test()
    train, validation = _other_split(request, request.train, "train"), _other_split(request, request.validation, "val")
    classes, columns = matched(protocol, sets)
    for one, what in ((train, "the probe's training set"), (validation, "the validation set")):
        _disjoint(request, [one], sets, f"{what} and the test set")
    _disjoint(request, [train], [validation], "the probe's training set and its validation set")
    leak = request.leak(sets)

    def made(readers: Sequence[ShardReader], own: Sequence[Columns]) -> Featured:
        return featured(encoder, readers, own, classes, cache, request.report)

    tested = made(sets, columns)
    fitted, chosen = (made([reader], [_columns_like(protocol, reader, classes)]) for reader in (train, validation))

    def of_share(share: float) -> tuple[Probed, Measured]:
        found = probe(fitted, chosen, tested.features, share)
        return found, measured(
            classes, found.test.astype(np.float32), tested.labels, tested.patients, n_train=found.n_train[0],
            validation=(found.validation.astype(np.float32), chosen.labels), threshold_from=_chosen_on(validation),
            exclusive=protocol.exclusive,
        )  # fmt: skip

    results: list[dict[str, Any]] = []
    rows, named = [], []
    for share in SHARES:
        found, measures = shared.by_first(partial(of_share, share), "fitting the probe")
        poor = [classes[column] for column in found.constant]
        about = {"share": share, "n_train": found.n_train, "C": found.strengths, "one_kind_only": poor}
        results.append(about | figures(measures))
        rows += [row | {"n_train": found.n_train[row["seed"]]} for row in measures.rows]
        named.append((f"{share:.0%}", measures))
    known = Known([""] * len(tested.features), tested.patients.tolist(), tested.labels, [], [], list(tested.undecodable))
    unknown = tuple(dict.fromkeys(name for one in columns for name in one.unknown))
    subject = _subject("probe", request, sets, known, leak, [
        *_unknown(protocol, unknown), f"features: {encoder.features_are}",
        *(f"{one['share']:.0%}: a subset of patients has only one kind of {', '.join(one['one_kind_only'])}, which then scores 0"
          for one in results if one["one_kind_only"]),
    ])  # fmt: skip
    more = {"classes": classes, "features": encoder.features_are, "results": results}
    notes = (*subject.notes, *_left_out(named[-1][1], known))
    return Outcome(document(subject, more), tuple(rows), _table(protocol, named), notes)


def finetune(
    request: Request, recipe: Recipe, folder: Path, shares: Sequence[float], seeds: Sequence[int], place: Place
) -> Outcome:
    """The image encoder and a head, trained on shares of the labels; the best checkpoint on validation is tested. Stopped if a
    stop was asked for. A collective call: every rank gets the outcome."""
    encoder, protocol, sets = request.encoder, request.protocol, request.test()
    assert isinstance(encoder, Trained)
    for share in shares:
        recipe.course(share)
    train, validation = (
        _other_split(request, url, split, "fine-tuning") for url, split in ((request.train, "train"), (request.validation, "val"))
    )
    classes, columns = matched(protocol, sets)
    for one, what in ((train, "the training set"), (validation, "the validation set")):
        _disjoint(request, [one], sets, f"{what} and the test set")
    _disjoint(request, [train], [validation], "the training set and the validation set")
    leak = request.leak(sets)
    others = [(reader, _columns_like(protocol, reader, classes)) for reader in (train, validation)]
    tuning = FineTuning(
        encoder, protocol, classes, recipe, folder, place, train=others[0], validation=others[1], tests=(sets, columns)
    )  # fmt: skip
    results: list[dict[str, Any]] = []
    rows, named, told = [], [], []
    for share in shares:
        cells, label = [tuning.cell(share, seed) for seed in seeds], f"{100 * share:g}%"
        test, chosen = cells[0].test, cells[0].validation
        measures = measured(
            classes, np.stack([cell.test.scores for cell in cells]), test.labels, test.patients,
            validation=(np.stack([cell.validation.scores for cell in cells]), chosen.labels),
            threshold_from=_chosen_on(validation), exclusive=protocol.exclusive,
        )  # fmt: skip
        macros = [float(np.nanmean(per_class_auc(cell.test.scores, test.labels))) for cell in cells]
        results.append({
            "share": share, "n_train": [cell.n_train for cell in cells], "seeds": list(seeds),
            "best_step": [cell.step for cell in cells], "validation_auroc_macro": [cell.auroc for cell in cells],
            "auroc_macro_of_seeds": macros, "auroc_macro_sd": float(np.std(macros, ddof=1)) if len(macros) > 1 else None,
            "one_kind_only": [cell.one_kind for cell in cells], **figures(measures),
        })  # fmt: skip
        rows += [row | {"seed": seeds[row["seed"]], "n_train": cells[row["seed"]].n_train} for row in measures.rows]
        named.append((label, measures))
        spread = f", sd {results[-1]['auroc_macro_sd']:.3f}" if len(macros) > 1 else ""
        each = ", ".join(f"{value:.3f} (seed {seed})" for seed, value in zip(seeds, macros, strict=True))
        told.append(f"{label}: macro AUROC {each}{spread}")
        told += [
            f"{label}, seed {seed}: the {cell.n_train} training images have {what} of "
            f"{', '.join(name for name, lacked in cell.one_kind.items() if lacked == what)}: scores of these mean nothing"
            for seed, cell in zip(seeds, cells, strict=True) for what in dict.fromkeys(cell.one_kind.values())
        ]  # fmt: skip
        if cells[0].unlisted:
            told.append(f"{label}: {cells[0].unlisted} lines of the list name no image of {train.url}")
    known = Known([""] * len(test.scores), test.patients.tolist(), test.labels, [], [], test.undecodable.tolist())
    unknown = tuple(dict.fromkeys(name for one in columns for name in one.unknown))
    subject = _subject("finetune", request, sets, known, leak, [*_unknown(protocol, unknown), *told])
    more = {"classes": classes, "recipe": recipe.model_dump(mode="json"), "results": results}
    notes = (*subject.notes, *_left_out(named[-1][1], known))
    return Outcome(document(subject, more), tuple(rows), _table(protocol, named), notes)


def retrieval(request: Request) -> Outcome:
    """Recall at 1, 5 and 10 of reports by images and of images by reports. ValueError if a sample has no report."""
    encoder, sets = request.encoder, request.test()
    leak = request.leak(sets)
    images = LabelledImages(sets, [Columns({}, ())] * len(sets), ())
    known, embedded = _embedded(request, images)
    lacking = sum(not report for report in known.reports)
    if lacking:
        names = ", ".join(str(reader.url) for reader in sets)
        raise ValueError(f"{lacking} of the {len(known.reports)} samples of {names} have no report, which retrieval needs")
    with encoder.evaluating():
        texts = _texts(encoder, known.reports)
    patients, results = np.array(known.patients), {}
    table: list[tuple[str, ...]] = [("identical reports", "", *(f"R@{k}" for k in RECALL_AT), "mean rank")]
    for kind, once in (("counted once", True), ("counted each", False)):
        by_image, by_text, rows = ranks(embedded, texts, known.reports, once=once)
        for way, places, of in (("image to text", by_image, patients), ("text to image", by_text, patients[rows])):
            right = hits(places)
            blocks = [weights @ right / weights.sum(1, keepdims=True) for weights in resampled(of)]
            around = [percentile_interval(column) for column in np.concatenate(blocks).T]
            results[f"{way.replace(' ', '_')}_{'once' if once else 'each'}"] = {
                "queries": len(places), "candidates": len(rows) if way == "image to text" else len(patients),
                **{f"R@{k}": float(value) for k, value in zip(RECALL_AT, right.mean(0), strict=True)},
                "mean_rank": float(places.mean()),
                "ci95": {f"R@{k}": interval for k, interval in zip(RECALL_AT, around, strict=True)},
            }  # fmt: skip
            cells = [_cell(value, interval) for value, interval in zip(right.mean(0), around, strict=True)]
            table.append((kind, way, *cells, f"{places.mean():.1f}"))
    subject = _subject("retrieval", request, sets, known, leak, [])
    return Outcome(document(subject, {"results": results}), (), tuple(table), (*subject.notes, *_lost(known)))


def _embedded(request: Request, images: LabelledImages) -> tuple[Known, np.ndarray]:
    encoder = request.encoder
    with encoder.evaluating():
        parts = images.all(
            encoder, lambda pixels: (encoder.embed_images(pixels),), lambda known, found: (known, found[0]), request.report
        )
    return Known.of_all([known for known, _ in parts]), np.concatenate([found for _, found in parts])


def _texts(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Their embeddings [N, E]. All ranks take part."""
    rank, world = shared.place()
    parts = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    own = [[encoder.embed_texts(part).float().cpu().numpy()] for part in parts[rank::world]]
    return np.concatenate(shared.together(own))


def pointing(request: Request) -> Outcome:
    """Whether patches respond to a class's prompts where its boxes are. ValueError for a set without boxes of the classes."""
    encoder, protocol, sets = request.encoder, request.protocol, request.test()
    evaluation = Evaluation(sets, protocol, encoder.prompts)
    evaluation.check(encoder)
    leak = request.leak(sets)

    def findings(known: Known, responses: Sequence[np.ndarray]) -> tuple[Known, list[tuple[str, int, Pointed]]]:
        (response,) = responses
        rows = [(known.patients[row], column, pointed(response[row, :, column], corners))
                for row, boxes in enumerate(known.boxes) for column, corners in boxes.items()]  # fmt: skip
        return replace(known, boxes=[{}] * len(known.keys)), rows

    with encoder.evaluating():
        directions = prompt_directions(encoder, evaluation.prompts)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        parts = evaluation.images.all(
            encoder, lambda pixels: (encoder.patches(pixels) @ directions.T,), findings, request.report
        )
    found = [row for _, rows in parts for row in rows]
    known = Known.of_all([known for known, _ in parts])
    if not found:
        urls = ", ".join(str(reader.url) for reader in sets)
        raise ValueError(f"{urls} has no boxes of {', '.join(evaluation.classes[:5])}, which pointing needs: pack it with boxes")
    columns = np.array([column for _, column, _ in found])
    values = np.array([[getattr(one, name) for name in _POINTING] for *_, one in found], float)
    present = np.unique(columns)
    groups = [columns == column for column in present]
    once = np.ones((1, len(found)))
    blocks = [_class_means(values, groups, weights) for weights in resampled(np.array([patient for patient, *_ in found]))]
    point, resamples = _class_means(values, groups, once)[0], np.concatenate(blocks)  # [classes, metrics], [R, classes, metrics]
    names = [evaluation.classes[column] for column in present]
    results: dict[str, Any] = {}
    table: list[tuple[str, ...]] = [("class", "findings", "maximum in box", "attention in boxes", "IoU", "CNR", "boxes' share")]
    labels = [*names, MACRO]
    for row, name in enumerate(labels):
        own = point[row] if name != MACRO else _mean(point[None])[0]
        around = resamples[:, row] if name != MACRO else _mean(resamples)
        spans = [percentile_interval(column) for column in around.T]
        count = int(groups[row].sum()) if name != MACRO else len(found)
        results[name] = {"findings": count, **dict(zip(_POINTING, map(float, own), strict=True)),
                         "ci95": dict(zip(_POINTING, spans, strict=True))}  # fmt: skip
        table.append((name, str(count), *(_cell(value, span) for value, span in zip(own, spans, strict=True))))
    notes = [*_unknown(protocol, evaluation.unknown)]
    bare = [name for name in evaluation.classes if name not in names]
    if bare:
        notes.append(f"classes without boxes: {', '.join(bare)}")
    subject = _subject("pointing", request, sets, known, leak, notes)
    more = {"classes": evaluation.classes, "prompts_hash": prompts_hash(evaluation.prompts), "results": results,
            "attention_temperature": TEMPERATURE, "iou_thresholds": THRESHOLDS}  # fmt: skip
    return Outcome(document(subject, more), (), tuple(table), (*subject.notes, *_lost(known)))


def _class_means(values: np.ndarray, groups: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """values [F, M] of findings, groups: those of each class [F] bool, weights [R, F] -> means [R, classes, M], nan left out."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([weights[:, g] @ filled[g] / (weights[:, g] @ known[g].astype(float)) for g in groups], 1)


def _mean(values: np.ndarray) -> np.ndarray:
    """[R, classes, M] -> mean over the classes that are known [R, M]."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, values, 0).sum(1) / known.sum(1))


# -- What the tasks share ---------------------------------------------------------------------------------------------


def _open(url: str, split: str) -> ShardReader:
    folder = find_split(url, split)
    return ShardReader(folder, load_manifest(folder))


def _other_split(request: Request, url: str | None, split: str, task: str = "the probe") -> ShardReader:
    """A split for the probe or another task: of the set that is named, else of that of the test split."""
    reader = _open(url or request.urls[0], split)
    if url is None and reader.manifest.split != split:
        option = "--train" if split == "train" else "--validation"
        raise ValueError(
            f"{request.urls[0]} is one split, {reader.manifest.split!r}, and {task} needs {split!r} too: name the folder that "
            f"holds train, val and test, or {option} URL"
        )
    return reader


def _any_split(protocol: Protocol) -> Protocol:
    return protocol.model_copy(update={"split": None})


def _columns_like(protocol: Protocol, reader: ShardReader, classes: Sequence[str]) -> Columns:
    """The columns of a training or validation set for the classes of the test set."""
    own, (columns,) = matched(_any_split(protocol), [reader])
    return Columns({name: classes.index(own[column]) for name, column in columns.labels.items() if own[column] in classes}, ())


def _disjoint(request: Request, one: Sequence[ShardReader], other: Sequence[ShardReader], what: str) -> None:
    if not request.allow_leak:
        leaks.refuse_common(one, other, what)


def _chosen_on(reader: ShardReader) -> str:
    return f"the best F1 on {reader.manifest.dataset}/{reader.manifest.split} ({reader.url})"


def _subject(
    task: str, request: Request, sets: Sequence[ShardReader], known: Known, leak: dict[str, Any], notes: Sequence[str]
) -> Subject:
    manifests, protocol, encoder = [reader.manifest for reader in sets], request.protocol, request.encoder
    count = len(known.keys)
    told = list(notes)
    if protocol.images is not None and count != protocol.images:
        told.append(f"{count} images, where {protocol.name} has {protocol.images}: figures of other images do not compare")
    if encoder.seen is None:
        told.append(f"leak: {encoder.name} does not tell which patients it was trained on")
    elif encoder.seen.unknown:
        told.append(f"leak: not all patients of {', '.join(encoder.seen.unknown)} are known, which the model was trained on")
    if leak["shards"] or leak["patients"] or leak["images"] or leak["data_sets"]:
        told.append("leak: the model was trained on some of these patients or images (--allow-leak)")
    return Subject(
        task=task, model=encoder.name, checkpoint_sha256=encoder.sha256, protocol=protocol.name, source=protocol.source.strip(),
        dataset="+".join(dict.fromkeys(manifest.dataset for manifest in manifests)),
        split_name="+".join(dict.fromkeys(manifest.split for manifest in manifests)),
        sets=tuple(dict.fromkeys(f"{manifest.dataset}/{manifest.split}" for manifest in manifests)),
        n=count, n_patients=len(set(known.patients)), undecodable=tuple(known.undecodable), leak=leak, notes=tuple(told),
    )  # fmt: skip


def _unknown(protocol: Protocol, labels: Sequence[str]) -> list[str]:
    return [f"labels unknown to the protocol {protocol.name}, left out: {', '.join(labels)}"] if labels else []


def _left_out(found: Measured, known: Known) -> list[str]:
    lines = [f"left out: {name}, {why}" for name, why in found.left_out.items()]
    return [*lines, f"thresholds: {found.threshold_from}", *_lost(known)]


def _lost(known: Known) -> list[str]:
    if not known.undecodable:
        return []
    return [f"left out, {len(known.undecodable)} images that cannot be decoded: {', '.join(known.undecodable[:5])}"]


def _cell(value: float, interval: tuple[float, float] | None) -> str:
    if np.isnan(value):
        return ""
    around = "" if interval is None or np.isnan(interval[0]) else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return f"{value:.3f}{around}"


_COLUMNS = {
    "auroc": (("AUROC", "auroc"),), "auprc": (("average precision", "auprc"),),
    "f1": (("F1", "f1_val_threshold"), ("F1, best on test", "f1_max_test")),
    "accuracy": (("accuracy", "acc_val_threshold"), ("accuracy, best F1 on test", "acc_at_f1_max")),
}  # fmt: skip


def _table(protocol: Protocol, results: Sequence[tuple[str, Measured]]) -> tuple[tuple[str, ...], ...]:
    """The protocol's metrics; those at a threshold from validation only where there is one."""
    first = results[0][1]
    shown = [
        (title, name) for metric in protocol.metrics for title, name in _COLUMNS[metric]
        if not (name.endswith("val_threshold") and getattr(first, name) is None)
    ]  # fmt: skip
    several = len(results) > 1
    table: list[tuple[str, ...]] = [(*(("labels",) if several else ()), "class", *(title for title, _ in shown))]
    for share, found in results:
        for name in (*found.auroc, MACRO):
            cells = []
            for _, metric in shown:
                values = getattr(found, metric)
                value = getattr(found, f"{metric}_macro") if name == MACRO and metric in ("auroc", "auprc") else values.get(name)
                shows = name == MACRO or metric == "auroc"  # the JSON holds all of them
                interval = found.ci95.get(metric, {}).get(name) if shows else None
                cells.append("" if value is None else _cell(value, interval))
            table.append((*((share,) if several else ()), name, *cells))
        if found.accuracy is not None:
            cell = _cell(found.accuracy, found.ci95["accuracy"][MACRO])
            table.append((*((share,) if several else ()), "highest score is right", cell, *[""] * (len(shown) - 1)))
    return tuple(table)
