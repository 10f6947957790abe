"""What the sweeps of the contrastive loss are told of the pairs, and what they give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Pairs:
    """The relation of N images (rows) to M texts (columns), and the weight of each.

    row_ids [N], column_ids [M]: int64; equal ids are positives, ids < 0 take no part. some_out: whether there may be any.
    exclude [N, M] bool (any strides) or None: pairs that take no part either.
    factor [], bias []: of the logits, float32 or float64, as all weights.
    softmax: row_mean [N] and column_mean [M] weigh the log-sum-exps, row_share and column_share one positive pair.
    sigmoid: a pair weighs row_mean x column_mean.
    """

    row_ids: Tensor
    column_ids: Tensor
    some_out: bool
    exclude: Tensor | None
    factor: Tensor
    bias: Tensor
    row_mean: Tensor
    column_mean: Tensor
    row_share: Tensor
    column_share: Tensor


@dataclass
class LogSums:
    """A log-sum-exp under way: maximum [N] and sum [N] of exp(logit - maximum)."""

    peak: Tensor
    total: Tensor

    @classmethod
    def empty(cls, length: int, dtype: torch.dtype, device: torch.device) -> LogSums:
        peak = torch.full((length,), -torch.inf, dtype=dtype, device=device)
        return cls(peak, torch.zeros_like(peak))

    def add(self, where: slice, logits: Tensor, dim: int) -> None:
        """Take in logits [rows, columns], summed over `dim`."""
        peak = logits.amax(dim)
        self.merge(where, peak, (logits - finite(peak).unsqueeze(dim)).exp_().sum(dim))

    def merge(self, where: slice | Tensor, peak: Tensor, total: Tensor) -> None:
        """Take in the (maximum, sum) of other logits of the same rows."""
        highest = torch.maximum(self.peak[where], peak)
        base = finite(highest)
        self.total[where] = self.total[where] * (self.peak[where] - base).exp() + total * (peak - base).exp()
        self.peak[where] = highest


class Partials(NamedTuple):
    """What one sweep leaves. total [2] float64: the loss's part outside the log-sum-exps, for rows and for columns."""

    rows: LogSums
    columns: LogSums
    total: Tensor


def finite(peak: Tensor) -> Tensor:
    """Maxima with 0 in place of -inf (rows in which no pair takes part): exp(-inf - 0) is 0, exp(-inf + inf) NaN."""
    return torch.where(peak == -torch.inf, 0, peak)
