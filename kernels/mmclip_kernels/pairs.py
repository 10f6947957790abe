"""Input and output of the contrastive loss's sweeps: the pairs, and log-sum-exps under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Pairs:
    """Which of N images (rows) and M texts (columns) are positives, which are left out, and the weight of each.

    row_ids [N], column_ids [M]: int32. Equal ids are positives; ids < 0 are left out. some_out: whether ids < 0 may occur.
    exclude [N, M] bool (any strides) or None: further pairs that are left out.
    factor [], bias []: logits are factor * cosine (+ bias). They and all weights are float32 or float64.
    Softmax mode: row_mean [N] and column_mean [M] are the weights of the log-sum-exps; row_share [N] and column_share [M] are
    those of one positive pair. Sigmoid mode: the weight of a pair is row_mean * column_mean.
    unit [2]: where weights are in a unit of their own, that unit, and the factor times it. None: they are not.
    kept [K]: room for the cosines of the first blocks, which the forward sweep leaves to the backward one. None: there is none.
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
    unit: Tensor | None = None
    kept: Tensor | None = None


class Weights(NamedTuple):
    """What rows and columns weigh, rows first and columns behind them, end to end [N + M]; before division by the sums.

    place: int32, see `Pairs`. mean: weight of a log-sum-exp, 0 where there is no positive. share: weight of one positive pair.
    sums [2], float64, and largest [2]: of `mean`, of rows and of columns.
    """

    place: Tensor
    mean: Tensor
    share: Tensor
    sums: Tensor
    largest: Tensor


class Slopes(NamedTuple):
    """What the backward sweep needs of rows and columns, end to end [N + M]: log-sum-exps (+inf where there is no pair), and
    weights that hold the upstream gradient. unit: see `Pairs`."""

    lse: Tensor
    mean: Tensor
    share: Tensor
    unit: Tensor | None


@dataclass
class LogSums:
    """A log-sum-exp under way: the maximum [N] so far, and the sum [N] of exp(logit - maximum)."""

    peak: Tensor
    total: Tensor

    @classmethod
    def empty(cls, length: int, dtype: torch.dtype, device: torch.device) -> LogSums:
        peak = torch.full((length,), -torch.inf, dtype=dtype, device=device)
        return cls(peak, torch.zeros_like(peak))

    def add(self, where: slice, logits: Tensor, dim: int) -> None:
        """Add logits [rows, columns], summed over `dim`."""
        peak = logits.amax(dim)
        self.merge(where, peak, (logits - finite(peak).unsqueeze(dim)).exp_().sum(dim))

    def merge(self, where: slice | Tensor, peak: Tensor, total: Tensor) -> None:
        """Add the (maximum, sum) of other logits of the same rows."""
        highest = torch.maximum(self.peak[where], peak)
        base = finite(highest)
        self.total[where] = self.total[where] * (self.peak[where] - base).exp() + total * (peak - base).exp()
        self.peak[where] = highest


class Partials(NamedTuple):
    """Result of a forward sweep. total [2] float64: the loss's part outside the log-sum-exps, for rows and for columns."""

    rows: LogSums
    columns: LogSums
    total: Tensor


def finite(peak: Tensor) -> Tensor:
    """Maxima with -inf (rows without any pair) replaced by 0: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN."""
    return torch.where(peak == -torch.inf, 0, peak)
