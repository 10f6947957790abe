"""impl="torch": the forward and backward sweep of the contrastive loss, in blocks, on any device, in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmclip_kernels.pairs import LogSums, Mode, Pairs, Partials

# Rows x columns of logits in memory at once: 4 MiB in float32, which fits a CPU cache (figures: kernels/bench/NOTES.md).
BLOCK = 1024, 1024


def sweep(image: Tensor, text: Tensor, pairs: Pairs, mode: Mode) -> Partials:
    """-> log-sum-exp partials of every row and column, and the loss's sums over positives. See `Partials`."""
    precise = pairs.factor.dtype
    rows = LogSums.empty(len(image), precise, image.device)
    columns = LogSums.empty(len(text), precise, image.device)
    total = torch.zeros(2, dtype=torch.float64, device=image.device)
    for here, there in _blocks(len(image), len(text)):
        logits = pairs.factor * (image[here].to(precise) @ text[there].to(precise).T)
        positive, out = _relation(pairs, here, there)
        if mode == "sigmoid":
            signed = torch.where(positive, -1, 1) * (logits + pairs.bias)
            cost = torch.nn.functional.softplus(signed)
            weighted = pairs.row_mean[here, None] * pairs.column_mean[there] * cost
            total += (weighted if out is None else weighted.masked_fill(out, 0)).sum()
            continue
        if out is not None:
            logits = logits.masked_fill_(out, -torch.inf)
        rows.add(here, logits, 1)
        columns.add(there, logits, 0)
        pull = torch.where(positive, logits, 0)
        total[0] -= pairs.row_share[here].double() @ pull.sum(1).double()
        total[1] -= pairs.column_share[there].double() @ pull.sum(0).double()
    return Partials(rows, columns, total)


def gradient(
    image: Tensor, text: Tensor, pairs: Pairs, mode: Mode, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d(loss)/d(image [N, E], text [M, E], factor [], bias []). The weights in `pairs` already hold the upstream gradient."""
    precise = pairs.factor.dtype
    image_grad = torch.zeros(image.shape, dtype=precise, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=precise, device=image.device)
    factor_grad, bias_grad = torch.zeros(2, dtype=precise, device=image.device)
    for here, there in _blocks(len(image), len(text)):
        images, texts = image[here].to(precise), text[there].to(precise)
        cosine = images @ texts.T
        positive, out = _relation(pairs, here, there)
        if mode == "sigmoid":
            sign = torch.where(positive, -1, 1)
            weight = pairs.row_mean[here, None] * pairs.column_mean[there]
            slope = sign * weight * torch.sigmoid(sign * (pairs.factor * cosine + pairs.bias))
            bias_grad += (slope if out is None else slope.masked_fill(out, 0)).sum()
        else:
            logits = pairs.factor * cosine
            slope = (logits - row_lse[here, None]).exp_().mul_(pairs.row_mean[here, None])
            slope += logits.sub_(column_lse[there]).exp_().mul_(pairs.column_mean[there])
            slope -= torch.where(positive, pairs.row_share[here, None] + pairs.column_share[there], 0)
        if out is not None:
            slope = slope.masked_fill_(out, 0)
        factor_grad += (slope * cosine).sum()
        slope *= pairs.factor
        image_grad[here].addmm_(slope, texts)
        text_grad[there].addmm_(slope.T, images)
    return image_grad, text_grad, factor_grad, bias_grad


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, rows, BLOCK[0]):
        for column in range(0, columns, BLOCK[1]):
            yield slice(row, row + BLOCK[0]), slice(column, column + BLOCK[1])


def _relation(pairs: Pairs, here: slice, there: slice) -> tuple[Tensor, Tensor | None]:
    """-> which pairs of the block are positives, and which are left out (None: no pair is)."""
    row_ids, column_ids = pairs.row_ids[here, None], pairs.column_ids[None, there]
    positive = row_ids == column_ids
    out = (row_ids < 0) | (column_ids < 0) if pairs.some_out else None
    if pairs.exclude is not None:
        excluded = pairs.exclude[here, there]
        out = excluded if out is None else out | excluded
    return (positive if out is None else positive & ~out), out
