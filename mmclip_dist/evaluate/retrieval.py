"""Retrieval: does an image find its report among all, and a report its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALL_AT = (1, 5, 10)
_ROWS = 1024  # queries at once


def ranks(
    images: np.ndarray, texts: np.ndarray, reports: Sequence[object], *, once: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The place of the best right answer, from 1: of each image among the reports [N], and of each report among the images [M];
    and the row of the sample that each of those reports is of [M].

    images, texts [N, E] of the same samples; reports: equal where two samples have the same report, any of which is right.
    once: identical reports are one candidate and one query (M of them), else each counts (M = N). A wrong answer with the same
    similarity as the best right one stands before it.
    """
    first: dict[object, int] = {}
    group = np.array([first.setdefault(report, row) for row, report in enumerate(reports)])  # the first row with that report
    columns = np.unique(group) if once else np.arange(len(texts))
    right = group[columns]
    return _ranks(images, texts[columns], group, right), _ranks(texts[columns], images, right, group), columns


def _ranks(queries: np.ndarray, candidates: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """own, other: number of the report of each query and of each candidate."""
    found = []
    for first in range(0, len(queries), _ROWS):
        similar = queries[first : first + _ROWS] @ candidates.T
        same = own[first : first + _ROWS, None] == other[None]
        best = np.where(same, similar, -np.inf).max(1, keepdims=True)
        found.append(1 + ((similar >= best) & ~same).sum(1))
    return np.concatenate(found)


def hits(places: np.ndarray) -> np.ndarray:
    """Whether a right answer is among the first k, for each k of RECALL_AT [N, 3]."""
    return places[:, None] <= np.array(RECALL_AT)
