"""What the kernels mean, in plain PyTorch: the specification, in any floating type up to float64."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE with several positives: the N x M matrix in full. Arguments as in `contrastive_loss`."""
    if image_ids is None or text_ids is None:
        image_ids, text_ids = torch.arange(len(image)), torch.arange(len(text))
    image, image_ids = image[image_ids >= 0], image_ids[image_ids >= 0]
    text, text_ids = text[text_ids >= 0], text_ids[text_ids >= 0]
    logits = scale * image @ text.T
    positive = (image_ids[:, None] == text_ids[None, :]).to(logits.dtype)
    return 0.5 * (_one_direction(logits, positive) + _one_direction(logits.T, positive.T))


def _one_direction(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean over the rows that have a positive of cross-entropy against evenly shared positives. [N, M] -> []."""
    matched = positive.sum(1) > 0
    if not matched.any():
        return logits.sum() * 0.0
    logits, positive = logits[matched], positive[matched]
    target = positive / positive.sum(1, keepdim=True)
    return (logits.logsumexp(1) - (target * logits).sum(1)).mean()
