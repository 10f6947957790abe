"""impl="triton": what each row and column of the contrastive loss weighs, and their log-sum-exps: one launch for each step.

The same as `weights_torch`, which says what the functions mean, but with log-sum-exps in base 2. Programs go through rows first
and columns behind them.
"""

# mypy: disallow-untyped-defs=false
# (arguments of Triton kernels have no Python types)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmclip_kernels.pairs import LogSums, Mode, Slopes, Weights

SIZE = 512  # rows or columns of a program
LN2 = tl.constexpr(math.log(2))


power = torch.exp2


def relate(
    row_ids: Tensor, column_ids: Tensor, all_row_ids: Tensor | None, counts: tuple[Tensor, Tensor] | None,
    row_weight: Tensor | None, column_weight: Tensor | None, mode: Mode, precise: torch.dtype,
) -> Weights:  # fmt: skip
    length, device = len(row_ids) + len(column_ids), row_ids.device
    place = torch.empty(length, dtype=torch.int32, device=device)
    mean, share = (torch.empty(length, dtype=precise, device=device) for _ in range(2))
    programs = max(triton.cdiv(length, SIZE), 1)
    by_program = torch.empty(programs, 4, dtype=torch.float64, device=device)
    columns, order = column_ids.sort(stable=True)
    rows = None if counts is not None else all_row_ids if all_row_ids is None else all_row_ids.sort().values
    of_rows, of_columns = counts or (None, None)
    _relate[(programs,)](
        row_ids, column_ids, columns, order, rows, of_rows, of_columns, row_weight, column_weight, place, mean, share, by_program,
        len(row_ids), len(column_ids), 0 if rows is None else len(rows), SOFTMAX=mode == "softmax", SIZE=SIZE,
    )  # fmt: skip
    return Weights(place, mean, share, by_program[:, :2].sum(0), by_program[:, 2:].amax(0))


def log_sums(rows: LogSums, columns: LogSums, mean: Tensor) -> tuple[Tensor, Tensor]:
    count = len(rows.peak)
    lse = torch.empty(len(mean), dtype=torch.float64, device=mean.device)
    programs = max(triton.cdiv(len(mean), SIZE), 1)
    by_program = torch.empty(programs, 2, dtype=torch.float64, device=mean.device)
    _log_sums[(programs,)](
        rows.peak, rows.total, columns.peak, columns.total, mean, lse, by_program, count, len(mean) - count, SIZE=SIZE
    )  # fmt: skip
    return lse, by_program.sum(0)


def slopes(
    upstream: Tensor, losses: Tensor, normalizer: Tensor, factor: Tensor, lse: Tensor, weights: Weights, rows: int, mode: Mode
) -> Slopes:
    """dL/ds is stored in the features' type, in units of 2^-14 of its largest possible value: float16 holds 2^-24 to 2^16."""
    unit = torch.empty(2, device=lse.device)
    rounded, mean, share = (torch.empty(len(lse), device=lse.device) for _ in range(3))
    _slopes[(max(triton.cdiv(len(lse), SIZE), 1),)](
        upstream.contiguous(), losses, normalizer, weights.largest, factor, lse, weights.mean, weights.share,
        rounded, mean, share, unit, rows, len(lse), SIGMOID=mode == "sigmoid", SIZE=SIZE,
    )  # fmt: skip
    return Slopes(rounded, mean, share, unit)


# -- Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _before(ordered, count, wanted, EQUAL: tl.constexpr):
    """How many of `ordered` [count] are below each of `wanted`; EQUAL: or equal to it."""
    low = tl.zeros(wanted.shape, tl.int32)
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        value = tl.load(ordered + middle, low < high, 0)
        passed = value < wanted
        if EQUAL:
            passed = value <= wanted
        high = tl.where((low < high) & (passed == 0), middle, high)
        low = tl.where((low < high) & passed, middle + 1, low)
        left = left // 2
    return low


@triton.jit
def _relate(
    row_ids, column_ids, ordered_columns, order, ordered_rows, row_counts, column_counts, row_weight, column_weight,
    place, mean, share, by_program, rows, columns, every_row, SOFTMAX: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """by_program [programs, 4]: the sum of `mean` over the program's rows and over its columns, and the largest of each."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_row, column = at < rows, at - rows
    is_column = (column >= 0) & (column < columns)
    id = tl.where(is_row, tl.load(row_ids + at, is_row, -1), tl.load(column_ids + column, is_column, -1))
    first = _before(ordered_columns, columns, id, False)
    found = first < columns
    found = found & (tl.load(ordered_columns + first, found, -1) == id)
    own = tl.where(found, tl.load(order + first, found, 0), columns + at)
    tl.store(place + at, tl.where(id < 0, -1, own).to(tl.int32), is_row | is_column)
    if row_counts is None:
        of_row = _before(ordered_columns, columns, id, True) - first
        of_column = _before(ordered_rows, every_row, id, True) - _before(ordered_rows, every_row, id, False)
        count = tl.where(is_row, of_row, of_column).to(tl.float64)
    else:
        of_row = tl.load(row_counts + at, is_row, 0)
        count = tl.where(is_row, of_row, tl.load(column_counts + column, is_column, 0)).to(tl.float64)
    takes = id >= 0
    if SOFTMAX:
        takes = takes & (count > 0)
    weight = tl.where(takes, 1.0, 0.0).to(tl.float64)
    if row_weight is not None:
        of_row = tl.load(row_weight + at, is_row & takes, 0.0).to(tl.float64)
        weight = tl.where(is_row, of_row, weight)
    if column_weight is not None:
        of_column = tl.load(column_weight + column, is_column & takes, 0.0).to(tl.float64)
        weight = tl.where(is_row, weight, of_column)
    tl.store(mean + at, weight, is_row | is_column)
    tl.store(share + at, weight / tl.maximum(count, 1.0), is_row | is_column)
    of_rows, of_columns = tl.where(is_row, weight, 0.0), tl.where(is_row, 0.0, weight)
    sums = by_program + 4 * tl.program_id(0)
    tl.store(sums, tl.sum(of_rows, 0))
    tl.store(sums + 1, tl.sum(of_columns, 0))
    tl.store(sums + 2, tl.max(of_rows, 0))
    tl.store(sums + 3, tl.max(of_columns, 0))


@triton.jit
def _log_sums(
    row_peak, row_total, column_peak, column_total, mean, lse, by_program, rows, columns, SIZE: tl.constexpr
):  # fmt: skip
    """by_program [programs, 2]: the weighted sum over the program's rows, and over its columns."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_row, column = at < rows, at - rows
    is_column = (column >= 0) & (column < columns)
    peak = tl.where(is_row, tl.load(row_peak + at, is_row, 0.0), tl.load(column_peak + column, is_column, 0.0))
    total = tl.where(is_row, tl.load(row_total + at, is_row, 0.0), tl.load(column_total + column, is_column, 0.0))
    log = peak.to(tl.float64) + tl.log2(total.to(tl.float64))
    log = tl.where(total == 0, float("inf"), log)
    tl.store(lse + at, log, is_row | is_column)
    weight = tl.load(mean + at, is_row | is_column, 0.0)
    weighted = tl.where(weight > 0, weight * log * LN2, 0.0)
    tl.store(by_program + 2 * tl.program_id(0), tl.sum(tl.where(is_row, weighted, 0.0), 0))
    tl.store(by_program + 2 * tl.program_id(0) + 1, tl.sum(tl.where(is_row, 0.0, weighted), 0))


@triton.jit
def _slopes(
    upstream, losses, normalizer, largest, factor, lse, mean, share, new_lse, new_mean, new_share, unit, rows, length,
    SIGMOID: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    # A loss of NaN makes all gradients NaN.
    of_rows = tl.load(upstream) * tl.load(normalizer) + 0 * tl.load(losses)
    of_columns = tl.load(upstream + 1) * tl.load(normalizer + 1) + 0 * tl.load(losses + 1)
    if SIGMOID:
        of_rows, of_columns = of_rows + of_columns, of_columns * 0 + 1
        bound = tl.abs(of_rows) * tl.load(largest) * tl.load(largest + 1)
    else:
        bound = tl.abs(of_rows) * tl.load(largest) + tl.abs(of_columns) * tl.load(largest + 1)
    bound = tl.where(bound == 0, 1.0, bound) * 0.00006103515625  # 2^-14
    if SIGMOID:
        of_rows /= bound
    else:
        of_rows, of_columns = of_rows / bound, of_columns / bound
    if tl.program_id(0) == 0:
        tl.store(unit, bound)
        tl.store(unit + 1, bound * tl.load(factor))
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < length
    scale = tl.where(at < rows, of_rows, of_columns)
    weight = tl.load(mean + at, inside, 0.0) * scale
    if not SIGMOID:
        exact = tl.load(lse + at, inside, 0.0)
        rounded = exact.to(tl.float32)
        rest = tl.where(tl.abs(exact) < float("inf"), rounded - exact, 0.0)
        weight *= 1 + rest * LN2  # takes up the rounding: 2^rest, where rest^2 is nothing
        tl.store(new_lse + at, rounded, inside)
    tl.store(new_mean + at, weight, inside)
    tl.store(new_share + at, tl.load(share + at, inside, 0.0) * scale, inside)


INTERPRETED = not isinstance(_relate, triton.JITFunction)
