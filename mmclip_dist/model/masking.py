"""What AttMIM rebuilds, and what ranks the patches. Pure functions; a kernel chooses the patches."""

from __future__ import annotations

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
