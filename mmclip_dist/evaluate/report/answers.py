"""How a checkpoint answers on held-out samples: its worst errors, what it retrieves, how similar a batch is to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from markupsafe import Markup

from mmclip_dist.evaluate.report.charts import matrix_chart
from mmclip_dist.evaluate.report.held_out import HeldOut, NotShown
from mmclip_dist.evaluate.retrieval import RECALL_AT, hits, ranks

_CLASSES = 20  # of which errors are shown
_BATCH = 16  # of the similarity matrix
_QUERIES = (0.25, 0.5, 0.9)  # places in the order of all queries, from the one that is answered best
_ANSWERS = 3
_SMALL = 176  # pixels of an embedded picture at most


@dataclass(frozen=True)
class Error:
    """score: similarity to the positive minus to the negative prompts; share: of the samples of the other kind that it passes."""

    picture: str
    score: float
    share: float


@dataclass(frozen=True)
class ClassErrors:
    """false_positive: the sample without the class that scores highest; false_negative: the one with it that scores lowest."""

    name: str
    false_positive: Error
    false_negative: Error


def worst_errors(held: HeldOut) -> tuple[ClassErrors, ...] | NotShown:
    """Of the classes that have samples with and without them."""
    both = [c for c in range(len(held.classes)) if {0, 1} <= set(held.labels[:, c].tolist())]
    if not both:
        return NotShown(f"no label of {', '.join(held.datasets)} has both positive and negative samples here")
    return tuple(_errors(held, column) for column in both[:_CLASSES])


def _errors(held: HeldOut, column: int) -> ClassErrors:
    scores, labels = held.scores[:, column], held.labels[:, column]
    present, absent = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    high, low = absent[scores[absent].argmax()], present[scores[present].argmin()]
    return ClassErrors(
        held.classes[column],
        Error(held.picture(high, _SMALL), float(scores[high]), float((scores[present] < scores[high]).mean())),
        Error(held.picture(low, _SMALL), float(scores[low]), float((scores[absent] > scores[low]).mean())),
    )


@dataclass(frozen=True)
class Answer:
    """A report (text) or an image (picture): its place, from 1, how similar it is to the query, and whether it belongs to it."""

    place: int
    content: str
    cosine: float
    right: bool


@dataclass(frozen=True)
class Query:
    """content: a picture or a text; answers: the first ones, and the best right one if it is not among them."""

    content: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Retrieval:
    """by_image: queries by images, answered by reports; by_text: the other way. image_recall, text_recall: k -> share of the
    queries whose right answer is among the first k. Identical reports count once."""

    samples: int
    reports: int
    by_image: tuple[Query, ...]
    by_text: tuple[Query, ...]
    image_recall: dict[int, float]
    text_recall: dict[int, float]


@dataclass(frozen=True)
class Pairs:
    """Samples with a report, embedded. rows [n]: of `HeldOut.samples`; images, texts [n, E]."""

    rows: np.ndarray
    reports: tuple[str, ...]
    images: np.ndarray
    texts: np.ndarray


def embedded_pairs(held: HeldOut) -> Pairs | NotShown:
    rows = held.with_reports
    if len(rows) < 2:
        return NotShown(f"{', '.join(held.datasets)} has {len(rows) or 'no'} report{'' if len(rows) else 's'} to retrieve")
    reports = tuple(held.samples[row].document.report for row in rows)
    unique = list(dict.fromkeys(reports))
    with torch.inference_mode():
        embedded = dict(zip(unique, held.encoder.embed_texts(unique).numpy(), strict=True))
    return Pairs(rows, reports, held.images[rows], np.stack([embedded[report] for report in reports]))


def retrieval(held: HeldOut, pairs: Pairs) -> Retrieval:
    """Examples both ways."""
    by_image, by_text, columns = ranks(pairs.images, pairs.texts, pairs.reports, once=True)
    similar = pairs.images @ pairs.texts[columns].T  # [samples, reports]
    texts = [pairs.reports[column] for column in columns]
    own = np.array([[text == report for text in texts] for report in pairs.reports])

    def picture(place: int) -> str:
        return held.picture(pairs.rows[place], _SMALL)

    of_images = tuple(
        Query(picture(q), tuple(_answers(similar[q], own[q], texts.__getitem__))) for q in _chosen(by_image)
    )
    of_texts = tuple(Query(texts[q], tuple(_answers(similar[:, q], own[:, q], picture))) for q in _chosen(by_text))
    return Retrieval(len(pairs.rows), len(texts), of_images, of_texts, _recall(by_image), _recall(by_text))


def _chosen(places: np.ndarray) -> Iterator[int]:
    """Queries at some places of the order from the best answered to the worst: neither the finest alone nor the poorest."""
    order = np.argsort(places, kind="stable")
    yield from dict.fromkeys(int(order[int(share * (len(order) - 1))]) for share in _QUERIES)


def _answers(similar: np.ndarray, own: np.ndarray, content: Callable[[int], str]) -> Iterator[Answer]:
    """similar, own [M]: of all candidates."""
    order = np.argsort(-similar, kind="stable")
    first_own = int(np.flatnonzero(own[order])[0])
    for place in sorted({*range(min(_ANSWERS, len(order))), first_own}):
        candidate = int(order[place])
        yield Answer(place + 1, content(candidate), float(similar[candidate]), bool(own[candidate]))


def _recall(places: np.ndarray) -> dict[int, float]:
    return dict(zip(RECALL_AT, hits(places).mean(0).tolist(), strict=True))


@dataclass(frozen=True)
class Similarity:
    """The matrix of a batch, drawn. first: how many images are most similar to their own report, of `size`."""

    svg: Markup
    size: int
    first: int


def similarity(held: HeldOut, pairs: Pairs) -> Similarity:
    """Of the first samples with different reports."""
    first: dict[str, int] = {}
    for place, report in enumerate(pairs.reports):
        first.setdefault(report, place)
    places = list(first.values())[:_BATCH]
    matrix = pairs.images[places] @ pairs.texts[places].T
    right = int((matrix.argmax(1) == np.arange(len(places))).sum())
    spoken = f"Cosine similarity of {len(places)} images and their reports; {right} images are most similar to their own report."
    return Similarity(matrix_chart(matrix, "image", "report", spoken), len(places), right)
