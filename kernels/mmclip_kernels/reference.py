"""What the kernels mean, in plain PyTorch: the specification, in any floating type up to float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    exclude: Tensor | None = None,
    bias: Tensor | None = None,
    mode: str = "softmax",
    directions: bool = False,
) -> Tensor:
    """The N x M matrix in full. Arguments and result as in `mmclip_kernels.contrastive_loss`."""
    if image_ids is None or text_ids is None:
        image_ids, text_ids = torch.arange(len(image)), torch.arange(len(text))
    rows, columns = image_ids >= 0, text_ids >= 0
    out = torch.zeros(len(image), len(text), dtype=torch.bool) if exclude is None else exclude.expand(len(image), -1)
    out = out.expand(-1, len(text))[rows][:, columns]
    u = torch.ones(len(image)) if row_weight is None else row_weight
    v = torch.ones(len(text)) if col_weight is None else col_weight
    u, v = u[rows].to(image.dtype), v[columns].to(image.dtype)
    logits = scale * image[rows] @ text[columns].T
    positive = (image_ids[rows][:, None] == text_ids[columns]) & ~out
    if mode == "sigmoid":
        cost = -F.logsigmoid(torch.where(positive, 1, -1) * (logits if bias is None else logits + bias))
        return (u[:, None] * v * cost).masked_fill(out, 0).sum() / (u.sum() if u.sum() > 0 else 1)
    halves = _one_direction(logits, positive, out, u), _one_direction(logits.T, positive.T, out.T, v)
    return torch.stack(halves) if directions else sum(halves, torch.zeros(())) / 2


def _one_direction(logits: Tensor, positive: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean, over the rows that have a positive, of cross-entropy against evenly shared positives. [N, M] -> []."""
    matched = positive.sum(1) > 0
    if not (weight * matched).sum() > 0:
        return logits.sum() * 0.0
    logits, positive, out, weight = logits[matched], positive[matched], out[matched], weight[matched]
    target = positive.to(logits.dtype) / positive.sum(1, keepdim=True)
    loss = logits.masked_fill(out, -torch.inf).logsumexp(1) - (target * logits).sum(1)
    return (weight * loss).sum() / weight.sum()
