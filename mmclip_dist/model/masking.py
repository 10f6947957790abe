"""What AttMIM rebuilds, and which tokens of a report EntMLM masks. Pure. Patches are chosen by a kernel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def ranked_or_drawn(scores: Tensor, noise: Tensor) -> Tensor:
    """What patches are ranked by: their scores, or the noise in rows whose scores are all equal (no attention known).

    scores, noise [B, P] -> [B, P] float32. A ranking of equal scores would mask the same corner of every image.
    """
    flat = (scores == scores[:, :1]).all(1, keepdim=True)
    return torch.where(flat, noise, scores.float())


def patch_pixels(image: Tensor, patch: int) -> Tensor:
    """The reconstruction target: pixels of each patch, normalised to mean 0 and variance 1. [B, 1, S, S] -> [B, P, patch^2].

    Source: MAE, normalised pixel targets.
    """
    pixels = F.unfold(image.float(), kernel_size=patch, stride=patch).transpose(1, 2)
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True, correction=0)
    return (pixels - mean) / (variance + 1e-6).sqrt()


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
