"""What is masked: image patches by their attention to the report (AttMIM), report tokens by entity (EntMLM). Pure."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def attention_scores(words: Tensor, patches: Tensor, word_mask: Tensor, temperature: float) -> Tensor:
    """How strongly each patch responds to the words: s_j = sum_i softmax_j(<w_i, p_j> / temperature).

    words [B, T, E] and patches [B, P, E], both L2-normalised; word_mask [B, T] bool, the words that count.
    -> [B, P], float32, without gradient; all 0 for a row without words. The softmax runs over *patches*: over words it
    would rank nothing. Source: MedIM, equation of the word-driven masking.
    """
    with torch.no_grad():
        response = (words.float() @ patches.float().transpose(1, 2) / temperature).softmax(dim=2)
        return (response * word_mask[:, :, None]).sum(1)


def top_patches(scores: Tensor, count: int, noise: Tensor, hint: float) -> Tensor:
    """Choose `count` patches of each image, mostly those of the highest score. scores, noise [B, P] -> [B, P] bool.

    A `hint` share of the top patches, drawn by `noise`, is passed over and the same number of others is taken instead:
    a little of what matters stays visible (AttMask; MedIM masks 90% of the top half and 10% of the rest). Among equal
    scores the lower index is taken first. Rows whose scores are all equal (no attention known) are drawn at random.
    """
    flat = (scores == scores[:, :1]).all(1, keepdim=True)
    ranked = torch.where(flat, noise, scores.float()).argsort(dim=1, descending=True, stable=True)
    rank = ranked.argsort(dim=1)
    top = rank < count
    swapped = round(hint * min(count, scores.shape[1] - count))
    drop = _lowest(noise.masked_fill(~top, torch.inf), swapped)
    take = _lowest(noise.masked_fill(top, torch.inf), swapped)
    return (top & ~drop) | take


def _lowest(values: Tensor, count: int) -> Tensor:
    """True at the `count` lowest values of each row. [B, P] -> [B, P] bool."""
    return values.argsort(dim=1, stable=True).argsort(dim=1) < count


def split_views(scores: Tensor, salient: int, context: int, noise: Tensor, hint: float) -> tuple[Tensor, Tensor]:
    """Indices of the salient view [B, salient] and of the context view [B, context], ascending, disjoint.

    The salient view holds the patches of the highest attention (A-CLIP); the context view is drawn from the rest.
    """
    chosen = top_patches(scores, salient, noise, hint)
    rest = _lowest(noise.masked_fill(chosen, torch.inf), context)
    return _indices(chosen, salient), _indices(rest, context)


def _indices(chosen: Tensor, count: int) -> Tensor:
    """Positions of the True values, `count` in every row. [B, P] -> [B, count], ascending."""
    return chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :count]


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
