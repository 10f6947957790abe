"""Pointing: does the image respond to a class's prompts where a box says that the finding is.

Shape letters: n findings with boxes, P patches of a grid with `side` patches a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TEMPERATURE = 0.1  # of the softmax over patches that is called attention
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Of similarities, for the IoU: its mean over them is MaCo's and BioViL's mIoU."""


@dataclass(frozen=True)
class Pointed:
    """One finding of one image. hit: the patch that responds most has its centre in a box; attention: share of the softmax over
    patches that lies in boxes; iou: mean over THRESHOLDS of that of the patches above it with the boxes; cnr: contrast to noise,
    |mean inside - mean outside| / sqrt(variance inside + variance outside); box_share: share of the image in boxes."""

    hit: bool
    attention: float
    iou: float
    cnr: float
    box_share: float


def pointed(response: np.ndarray, corners: np.ndarray) -> Pointed:
    """response [P]: similarity of each patch with a class. corners [n, 4]: its boxes (left, top, right, bottom in shares)."""
    side = round(len(response) ** 0.5)
    inside = covered(corners, side)
    best = int(response.argmax())
    weights = np.exp((response - response.max()) / TEMPERATURE)
    overlaps = []
    for threshold in THRESHOLDS:
        chosen = response >= threshold
        common = inside[chosen].sum()
        overlaps.append(common / (chosen.sum() + inside.sum() - common))
    return Pointed(
        hit=holds(corners, (best % side + 0.5) / side, (best // side + 0.5) / side),
        attention=float((weights * inside).sum() / weights.sum()), iou=float(np.mean(overlaps)), cnr=_contrast(response, inside),
        box_share=float(inside.mean()),
    )  # fmt: skip


def covered(corners: np.ndarray, side: int) -> np.ndarray:
    """Share of each patch that lies in the boxes [side * side]; boxes of one finding hardly overlap, and at most all counts."""
    edges = np.arange(side + 1) / side
    found = np.zeros((side, side))
    for left, top, right, bottom in corners:
        across = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None) * side
        down = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None) * side
        found += down[:, None] * across[None]
    return np.minimum(found, 1).ravel()


def holds(corners: np.ndarray, x: float, y: float) -> bool:
    """Whether a point lies in one of the boxes."""
    return bool(((corners[:, 0] <= x) & (x < corners[:, 2]) & (corners[:, 1] <= y) & (y < corners[:, 3])).any())


def _contrast(response: np.ndarray, inside: np.ndarray) -> float:
    """nan for boxes that cover all of the image, or none of it, and where nothing varies."""
    sides = []
    for weights in (inside, 1 - inside):
        if weights.sum() < 1e-9:
            return float("nan")
        mean = (weights * response).sum() / weights.sum()
        sides.append((mean, (weights * (response - mean) ** 2).sum() / weights.sum()))
    (mean_in, var_in), (mean_out, var_out) = sides
    noise = (var_in + var_out) ** 0.5
    return float(abs(mean_in - mean_out) / noise) if noise > 0 else float("nan")
