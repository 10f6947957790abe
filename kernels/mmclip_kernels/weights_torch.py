"""impl="torch": what each row and column of the contrastive loss weighs, and their log-sum-exps. Vectors only, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmclip_kernels.pairs import LogSums, Mode, Slopes, Weights

power = torch.exp  # log-sum-exps are in this base


def relate(
    row_ids: Tensor, column_ids: Tensor, all_row_ids: Tensor | None, counts: tuple[Tensor, Tensor] | None,
    row_weight: Tensor | None, column_weight: Tensor | None, mode: Mode, precise: torch.dtype,
) -> Weights:  # fmt: skip
    """Which of N rows and M columns belong together, and what they weigh.

    all_row_ids: of all ranks, in any order. counts ([N], [M]): how many positives each has, where that is known.
    """
    if counts is None:
        assert all_row_ids is not None
        counts = _occurrences(row_ids, column_ids), _occurrences(column_ids, all_row_ids)
    sides = []
    for ids, count, weight in ((row_ids, counts[0], row_weight), (column_ids, counts[1], column_weight)):
        takes = (ids >= 0) & (count > 0) if mode == "softmax" else ids >= 0
        mean = takes.to(precise) if weight is None else torch.where(takes, weight.to(precise), 0)
        sides.append((mean, mean / count.clamp(min=1).to(precise)))
    (row_mean, row_share), (column_mean, column_share) = sides
    return Weights(
        _places(row_ids, column_ids), torch.cat([row_mean, column_mean]), torch.cat([row_share, column_share]),
        torch.stack([row_mean.sum(dtype=torch.float64), column_mean.sum(dtype=torch.float64)]), row_mean.new_zeros(2),
    )  # fmt: skip


def log_sums(rows: LogSums, columns: LogSums, mean: Tensor) -> tuple[Tensor, Tensor]:
    """-> log-sum-exps [N + M], +inf where there is no pair, and their weighted sums over rows and columns [2]; float64.

    In float32, gradients at a scale of 100 would be three times less exact than open_clip's.
    """
    total = torch.cat([rows.total, columns.total]).double()
    lse = torch.where(total == 0, torch.inf, torch.cat([rows.peak, columns.peak]) + total.log())
    weighted = torch.where(mean > 0, mean * lse, 0)
    return lse, torch.stack([part.sum() for part in weighted.split([len(rows.total), len(columns.total)])])


def slopes(
    upstream: Tensor, losses: Tensor, normalizer: Tensor, factor: Tensor, lse: Tensor, weights: Weights, rows: int, mode: Mode
) -> Slopes:
    """upstream [2], losses [2], normalizer [2] (1 / sum of weights) -> weights of the N rows and M columns in dL/ds."""
    of_rows, of_columns = (upstream * normalizer + 0 * losses).to(factor.dtype)  # a loss of NaN makes all gradients NaN
    mean = weights.mean
    if mode == "sigmoid":
        return Slopes(mean, torch.cat([(of_rows + of_columns) * mean[:rows], mean[rows:]]), weights.share, None)
    scale = torch.cat([of_rows.expand(rows), of_columns.expand(len(mean) - rows)])
    rounded = lse.to(factor.dtype)
    rest = torch.where(rounded.isfinite(), rounded - lse, 0).to(factor.dtype)  # the weight takes up the rounding
    return Slopes(rounded, scale * mean * rest.exp(), scale * weights.share, None)


def _places(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """The ids as int32 of the same meaning [N + M]: the place of the first column with an id; a place of its own behind all
    columns where no column has it. Ids < 0 become -1. Does not wait for the device.

    Where texts lie in the order of their images, a block of logits away from the diagonal then shows by the least and greatest
    id of its rows and columns that it holds no positive.
    """
    count = len(column_ids)
    ids = torch.cat([row_ids, column_ids])
    place = torch.arange(count, count + len(ids), device=ids.device)
    if count:
        ordered, order = column_ids.sort(stable=True)
        found = torch.searchsorted(ordered, ids).clamp(max=count - 1)
        place = torch.where(ordered[found] == ids, order[found], place)
    return torch.where(ids < 0, -1, place).int()


def _occurrences(wanted: Tensor, among: Tensor) -> Tensor:
    """How often each id of `wanted` [n] occurs in `among` [m] -> [n]. Does not wait for the device."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
