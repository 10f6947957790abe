"""Which tokens of a report EntMLM masks. Pure."""

from __future__ import annotations

import numpy as np


def masked_tokens(
    words: np.ndarray,
    entities: list[np.ndarray],
    random: np.random.Generator,
    *,
    probability: float,
    word_probability: float,
) -> np.ndarray:
    """Which tokens of a report EntMLM masks. -> [T] bool.

    words [T]: index of the word that each token belongs to, -1 for special tokens. entities: token positions of each
    entity. Every entity is masked whole with `probability`, at least one a report; a report without entities loses each
    whole word with `word_probability`, again at least one (N: MRM, M3AE).
    """
    mask = np.zeros(len(words), dtype=bool)
    units = entities
    if not units:
        units = [np.flatnonzero(words == word) for word in np.unique(words[words >= 0])]
        probability = word_probability
    if not units:
        return mask
    drawn = random.random(len(units)) < probability
    drawn[random.integers(len(units))] |= not drawn.any()
    for unit, masked in zip(units, drawn, strict=True):
        mask[unit] |= masked
    return mask
