"""impl="torch": the forward and backward sweep of the contrastive loss, in blocks, on any device, in float32 or float64.

Matrix products take nearly all the time. The rest is passes over a block of logits, and so there are few: they write to the same
memory, a block without positives compares no ids, and one exponential serves both directions where log-sum-exps are near.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmclip_kernels.pairs import LogSums, Mode, Pairs, Partials, finite

# Rows x columns of logits in memory at once: 3 x 2 MiB in float32, which fits a CPU cache (figures: kernels/bench/NOTES.md).
BLOCK = 512, 1024

# Cosines of each 32, and how many at most, that the backward sweep does not compute again. Each spares 1/32 of one of four
# products; with five of them the loss still takes less than a tenth of the memory of eager PyTorch.
KEPT_OF_32, KEPT_MOST = 5, 1 << 24

# One exponential serves both directions while no column's sum is below FAINT, where terms of it may be lost, and all log-sum-exps
# lie within NEAR: the difference of one of them to the greatest then rounds to less than a logit of 16 does.
FAINT, NEAR = 1e-20, 16.0


def kept_size(rows: int, columns: int, device: torch.device) -> int:
    """How many cosines the forward sweep may leave to the backward one. On a card the memory is worth more than the product."""
    return min(rows * columns * KEPT_OF_32 // 32, KEPT_MOST) if device.type == "cpu" else 0


def sweep(image: Tensor, text: Tensor, pairs: Pairs, mode: Mode) -> Partials:
    """-> log-sum-exp partials of every row and column, and the loss's sums over positives. See `Partials`."""
    precise = pairs.factor.dtype
    rows = LogSums.empty(len(image), precise, image.device)
    columns = LogSums.empty(len(text), precise, image.device)
    total = torch.zeros(2, dtype=torch.float64, device=image.device)
    for here, there, _, _, cosine, logits, spare, positive, out in _blocks(image, text, pairs, keep=True):
        torch.mul(cosine, pairs.factor, out=logits)
        if mode == "sigmoid":
            cost = torch.nn.functional.softplus(_against(logits.add_(pairs.bias), positive))
            cost *= torch.mul(pairs.row_mean[here, None], pairs.column_mean[there], out=spare)
            total += (cost if out is None else cost.masked_fill_(out, 0)).sum()
            continue
        if out is not None:
            logits.masked_fill_(out, -torch.inf)
        if positive is not None:
            pull = torch.where(positive, logits, 0)
            total[0] -= pairs.row_share[here].double() @ pull.sum(1).double()
            total[1] -= pairs.column_share[there].double() @ pull.sum(0).double()
        peak = logits.amax(1)
        powers = torch.sub(logits, finite(peak)[:, None], out=spare).exp_()
        rows.merge(here, peak, powers.sum(1))
        highest = peak.amax()
        sums = powers.mul_((peak - finite(highest)).exp()[:, None]).sum(0)
        if image.device.type == "cpu" and (sums > FAINT).all():  # elsewhere the host would wait for the device
            shift = sums.log().round_()  # a whole number is exact; the logarithm of a sum far from 1 would round more
            columns.merge(there, highest + shift, sums * (-shift).exp())
        else:
            columns.add(there, logits, 0)
    return Partials(rows, columns, total)


def gradient(
    image: Tensor, text: Tensor, pairs: Pairs, mode: Mode, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d(loss)/d(image [N, E], text [M, E], factor [], bias []). The weights in `pairs` already hold the upstream gradient."""
    precise = pairs.factor.dtype
    image_grad = torch.zeros(image.shape, dtype=precise, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=precise, device=image.device)
    factor_grad, bias_grad = torch.zeros(2, dtype=torch.float64, device=image.device)
    column_lse = column_lse.masked_fill(pairs.column_ids < 0, torch.inf)  # of padding too: it takes part in no block
    highest = _common(row_lse, column_lse) if mode == "softmax" else None
    if highest is not None:
        row_mean, column_mean = pairs.row_mean * (highest - row_lse).exp(), pairs.column_mean * (highest - column_lse).exp()
    for here, there, images, texts, cosine, slope, spare, positive, out in _blocks(image, text, pairs, keep=False):
        torch.mul(cosine, pairs.factor, out=slope)
        if mode == "sigmoid":
            _against(_against(slope.add_(pairs.bias), positive).sigmoid_(), positive)
            slope.mul_(torch.mul(pairs.row_mean[here, None], pairs.column_mean[there], out=spare))
            bias_grad += (slope if out is None else slope.masked_fill(out, 0)).sum()
        elif highest is not None:
            slope.sub_(highest).exp_().mul_(torch.add(row_mean[here, None], column_mean[there], out=spare))
        else:
            of_rows = torch.sub(slope, row_lse[here, None], out=spare).exp_().mul_(pairs.row_mean[here, None])
            slope.sub_(column_lse[there]).exp_().mul_(pairs.column_mean[there]).add_(of_rows)
        if mode == "softmax" and positive is not None:
            slope.sub_(torch.add(pairs.row_share[here, None], pairs.column_share[there], out=spare).mul_(positive))
        if out is not None:
            slope.masked_fill_(out, 0)
        factor_grad += torch.mul(slope, cosine, out=spare).sum()
        image_grad[here].addmm_(slope, texts)
        text_grad[there].addmm_(slope.T, images)
    return image_grad.mul_(pairs.factor), text_grad.mul_(pairs.factor), factor_grad.to(precise), bias_grad.to(precise)


def _blocks(
    image: Tensor, text: Tensor, pairs: Pairs, *, keep: bool
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """-> for each block its rows and columns, images [n, E] and texts [m, E], their cosines [n, m], two buffers [n, m], and as of
    `_relation` its positives and what is left out. The cosines and buffers of the next block are in the same memory.

    keep: cosines go into `pairs.kept` as far as there is room; else they are taken from it."""
    precise = pairs.factor.dtype
    size = min(BLOCK[0], len(image)) * min(BLOCK[1], len(text))
    memory = torch.empty(3, size, dtype=precise, device=image.device)
    kept = memory.new_empty(0) if pairs.kept is None else pairs.kept
    of_columns = [_extent(pairs.column_ids[there]) for there in _steps(len(text), BLOCK[1])]
    for here in _steps(len(image), BLOCK[0]):
        images, of_rows = image[here].to(precise), _extent(pairs.row_ids[here])
        for there, of_texts in zip(_steps(len(text), BLOCK[1]), of_columns, strict=True):
            texts = text[there].to(precise)
            cosine, first, second = memory[:, : len(images) * len(texts)].view(3, len(images), len(texts))
            room, kept = kept[: cosine.numel()], kept[cosine.numel() :]
            stays = room.numel() == cosine.numel()
            if stays:
                cosine = room.view_as(cosine)
            if keep or not stays:
                torch.mm(images, texts.T, out=cosine)  # out: autocast, which would round the features, leaves it alone
            yield here, there, images, texts, cosine, first, second, *_relation(pairs, here, there, of_rows, of_texts)


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _extent(ids: Tensor) -> tuple[int, int]:
    """The least and the greatest id. Elsewhere than on a CPU, where the host would wait: any id."""
    if ids.device.type != "cpu":
        return -1, 1 << 31
    least, greatest = ids.aminmax()
    return int(least), int(greatest)


def _relation(
    pairs: Pairs, here: slice, there: slice, of_rows: tuple[int, int], of_columns: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """-> which pairs of the block are positives, and which are left out. None: no pair is."""
    row_ids, column_ids = pairs.row_ids[here, None], pairs.column_ids[None, there]
    out = (row_ids < 0) | (column_ids < 0) if pairs.some_out and min(of_rows[0], of_columns[0]) < 0 else None
    if pairs.exclude is not None:
        excluded = pairs.exclude[here, there]
        out = excluded if out is None else out | excluded
    if of_rows[0] > of_columns[1] or of_columns[0] > of_rows[1]:
        return None, out
    positive = row_ids == column_ids
    return (positive if out is None else positive & ~out), out


def _against(values: Tensor, positive: Tensor | None) -> Tensor:
    """Turn the sign of positives, in place: the sigmoid loss raises their logits and lowers all others."""
    return values if positive is None else torch.where(positive, -values, values, out=values)


def _common(row_lse: Tensor, column_lse: Tensor) -> Tensor | None:
    """The greatest log-sum-exp, if all are near it: then no exponential around it overflows or is lost. None: they are not."""
    if row_lse.device.type != "cpu":  # the host would wait for the device
        return None
    every = torch.cat([row_lse, column_lse])
    every = every[every != torch.inf]  # of rows without any pair
    return every.amax() if len(every) and every.amax() - every.amin() <= NEAR else None
