"""impl="triton": the forward and backward sweep of the contrastive loss as fused kernels, one program for each tile of logits.

There are no atomic additions. Each tile writes its own partials, which are then summed in a fixed order: results repeat bit for
bit. `contrastive_torch` computes the same in PyTorch; `contrastive` calls one or the other.
"""

# mypy: disallow-untyped-defs=false
# (arguments of Triton kernels have no Python types)

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmclip_kernels import tiles
from mmclip_kernels.pairs import LogSums, Mode, Pairs, Partials, finite

# exp(-60). A sum of exponentials below this is computed again around its own maximum: float32 ends at 1e-38, so the terms of
# such a small sum may have lost digits.
FAINT = tl.constexpr(1e-26)
# If a log-sum-exp lies this far below the highest of its tile, rows and columns get separate exponentials. exp(60) does not
# overflow.
SPREAD = tl.constexpr(60.0)


def sweep(image: Tensor, text: Tensor, pairs: Pairs, mode: Mode) -> Partials:
    """-> log-sum-exp partials of every row and column, and the loss's sums over positives. See `Partials`."""
    image, text = image.contiguous(), text.contiguous()
    tile = tiles.sweep_tile(image.dtype, pairs.exclude is not None)
    device = image.device
    rows, columns = (LogSums.empty(len(x), torch.float32, device) for x in (image, text))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for here, there in _blocks(len(image), len(text), tiles.SWEEP_BLOCK):
        high, wide = here.stop - here.start, there.stop - there.start
        down, across = triton.cdiv(high, tile.rows), triton.cdiv(wide, tile.columns)
        by_row = torch.empty(2, across, high if mode == "softmax" else 0, device=device)
        by_column = torch.empty(2, down, wide if mode == "softmax" else 0, device=device)
        by_tile = torch.empty(down * across, 2, device=device)
        exclude, row_step, column_step = _exclusions(pairs, here, there)
        _sweep_tile[(down * across,)](
            image[here], text[there], pairs.row_ids[here], pairs.column_ids[there], exclude, pairs.factor, pairs.bias,
            pairs.row_mean[here], pairs.column_mean[there], pairs.row_share[here], pairs.column_share[there],
            by_row, by_column, by_tile, high, wide, image.shape[1], row_step, column_step,
            **_options(tile, image.shape[1], pairs, mode),
        )  # fmt: skip
        total += by_tile.sum(0, dtype=torch.float64)
        if mode == "softmax":
            rows.merge(here, *_together(*by_row))
            columns.merge(there, *_together(*by_column))
    return Partials(rows, columns, total)


def gradient(
    image: Tensor, text: Tensor, pairs: Pairs, mode: Mode, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d(loss)/d(image [N, E], text [M, E], factor [], bias []). The weights in `pairs` already hold the upstream gradient."""
    image, text, tile = image.contiguous(), text.contiguous(), tiles.gradient_tile(image.dtype)
    image_grad, text_grad = (torch.zeros(x.shape, device=x.device) for x in (image, text))
    scalars = torch.zeros(2, device=image.device)
    # dL/ds is stored in the features' type. `unit` scales its largest possible value to 2^14: float16 holds 2^-24 to 2^16.
    if mode == "softmax":
        unit = _largest(pairs.row_mean) + _largest(pairs.column_mean)
    else:
        unit = _largest(pairs.row_mean) * _largest(pairs.column_mean)
    unit = torch.where(unit == 0, 1, unit) * 2.0**-14
    wide = tiles.GRADIENT_BLOCK[1] * 2 // image.element_size()
    for here, there in _blocks(len(image), len(text), (tiles.GRADIENT_BLOCK[0], wide)):
        images, texts = image[here], text[there]
        count = triton.cdiv(len(images), tile.rows) * triton.cdiv(len(texts), tile.columns)
        slope = torch.empty(len(images), len(texts), dtype=image.dtype, device=image.device)
        by_tile = torch.empty(count, 2, device=image.device)
        exclude, row_step, column_step = _exclusions(pairs, here, there)
        _gradient_tile[(count,)](
            images, texts, pairs.row_ids[here], pairs.column_ids[there], exclude, pairs.factor, pairs.bias,
            pairs.row_mean[here], pairs.column_mean[there], pairs.row_share[here], pairs.column_share[there],
            row_lse[here], column_lse[there], unit, slope, by_tile,
            len(images), len(texts), image.shape[1], row_step, column_step,
            **_options(tile, image.shape[1], pairs, mode),
        )  # fmt: skip
        scalars += by_tile.sum(0)
        image_grad[here] += _product(slope, texts)
        text_grad[there] += _product(slope.T, images)
    of_unit = pairs.factor * unit
    return image_grad.mul_(of_unit), text_grad.mul_(of_unit), scalars[0], scalars[1]


def _blocks(rows: int, columns: int, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for row in range(0, rows, size[0]):
        for column in range(0, columns, size[1]):
            yield slice(row, min(row + size[0], rows)), slice(column, min(column + size[1], columns))


def _exclusions(pairs: Pairs, here: slice, there: slice) -> tuple[Tensor | None, int, int]:
    """-> a block of the exclusions and its two strides. A broadcast row or column has stride 0."""
    if pairs.exclude is None:
        return None, 0, 0
    block = pairs.exclude[here, there]
    return block, block.stride(0), block.stride(1)


def _options(tile: tiles.Tile, width: int, pairs: Pairs, mode: Mode) -> dict[str, int | bool]:
    return {
        "SIGMOID": mode == "sigmoid", "SOME_OUT": pairs.some_out, "WHOLE": width % tile.depth == 0, "UPCAST": INTERPRETED,
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _together(peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the (maximum, sum) of each tile [tiles, n] -> of all tiles [n]."""
    highest = peak.amax(0)
    return highest, (peak.sub_(finite(highest)).exp_() * total).sum(0)


def _largest(weight: Tensor) -> Tensor:
    return torch.cat([weight.abs(), weight.new_zeros(1)]).amax()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product that is summed and returned in float32, whatever the type of its factors."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


# -- Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(high, wide, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """-> row and column of this program's tile. Eight tile rows at a time, column by column, keep features in the L2 cache."""
    GROUP: tl.constexpr = 8
    down, across = tl.cdiv(high, ROWS), tl.cdiv(wide, COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    return first + program % size, program % (GROUP * across) // size


@triton.jit
def _cosines(
    image, text, rows, columns, high, wide, width,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """<image_i, text_j> of a tile, in float32. Rows past the end repeat the last row: the caller must mask them."""
    row = tl.minimum(rows, high - 1).to(tl.int64)
    column = tl.minimum(columns, wide - 1).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    image_at = image + row[:, None] * width + depth[None, :]
    text_at = text + column[None, :] * width + depth[:, None]
    cosine = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        if WHOLE:
            a, b = tl.load(image_at), tl.load(text_at)
        else:
            a = tl.load(image_at, mask=depth[None, :] < width - start, other=0.0)
            b = tl.load(text_at, mask=depth[:, None] < width - start, other=0.0)
        if UPCAST:  # Triton 3.9's interpreter gives wrong products of two-byte types
            a, b = a.to(tl.float32), b.to(tl.float32)
        cosine = tl.dot(a, b, cosine, input_precision="ieee")
        image_at += DEPTH
        text_at += DEPTH
    return cosine


@triton.jit
def _taking_part(
    row_id, column_id, exclude, rows, columns, high, wide, row_step, column_step, SOME_OUT: tl.constexpr
):  # fmt: skip
    """Which pairs of a tile are neither past the end nor left out."""
    row_in, column_in = rows < high, columns < wide
    if SOME_OUT:
        row_in, column_in = row_in & (row_id >= 0), column_in & (column_id >= 0)
    taking = row_in[:, None] & column_in[None, :]
    if exclude is not None:
        at = exclude + rows[:, None].to(tl.int64) * row_step + columns[None, :].to(tl.int64) * column_step
        taking = taking & (tl.load(at, mask=taking, other=1) == 0)
    return taking


@triton.jit
def _may_match(row_id, column_id):
    """Whether a tile may hold a positive. Most hold none, and comparing all pairs of ids costs a tenth of the matrix product."""
    above = tl.max(row_id, 0) >= tl.min(column_id, 0)
    return above & (tl.min(row_id, 0) <= tl.max(column_id, 0))


@triton.jit
def _sweep_tile(
    image, text, row_ids, column_ids, exclude, factor, bias, row_mean, column_mean, row_share, column_share,
    by_row, by_column, by_tile, high, wide, width, row_step, column_step,
    SIGMOID: tl.constexpr, SOME_OUT: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes by_row [2, tiles across, high] and by_column [2, tiles down, wide]: (maximum, sum of exp) of each tile's rows and
    columns; and by_tile [tiles, 2]: the tile's part of the loss outside the log-sum-exps, for rows and for columns."""
    down, across = _place(high, wide, ROWS, COLUMNS)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    cosine = _cosines(image, text, rows, columns, high, wide, width, WHOLE, UPCAST, ROWS, COLUMNS, DEPTH)
    row_in, column_in = rows < high, columns < wide
    row_id, column_id = tl.load(row_ids + rows, row_in, -1), tl.load(column_ids + columns, column_in, -1)
    taking = _taking_part(row_id, column_id, exclude, rows, columns, high, wide, row_step, column_step, SOME_OUT)
    logits = tl.load(factor) * cosine
    tile = by_tile + 2 * tl.program_id(0)
    if SIGMOID:
        matched = row_id[:, None] == column_id[None, :]
        signed = (logits + tl.load(bias)) * tl.where(matched, -1.0, 1.0)
        rest = tl.exp(-tl.abs(signed))  # log(1 + rest) below must not lose a small rest to rounding
        above = 1.0 + rest
        log = tl.where(above == 1.0, rest, tl.log(above) * (rest / tl.where(above == 1.0, 1.0, above - 1.0)))
        cost = tl.maximum(signed, 0.0) + log
        row_weight = tl.load(row_mean + rows, row_in, 0.0)
        column_weight = tl.load(column_mean + columns, column_in, 0.0)
        whole = tl.sum(tl.sum(tl.where(taking, row_weight[:, None] * column_weight[None, :] * cost, 0.0), 1), 0)
        tl.store(tile, whole)
        tl.store(tile + 1, whole)
    else:
        row_pull, column_pull = 0.0, 0.0
        if _may_match(row_id, column_id):
            pull = tl.where((row_id[:, None] == column_id[None, :]) & taking, logits, 0.0)
            row_pull -= tl.sum(tl.sum(pull, 1) * tl.load(row_share + rows, row_in, 0.0), 0)
            column_pull -= tl.sum(tl.sum(pull, 0) * tl.load(column_share + columns, column_in, 0.0), 0)
        tl.store(tile, row_pull)
        tl.store(tile + 1, column_pull)
        logits = tl.where(taking, logits, -float("inf"))
        # Usually one exponential, around the tile's maximum, serves the sums of rows and columns.
        highest = tl.max(tl.max(logits, 1), 0)
        power = tl.exp(logits - tl.where(highest == -float("inf"), 0.0, highest))
        row_total, column_total = tl.sum(power, 1), tl.sum(power, 0)
        row_peak, column_peak = tl.full((ROWS,), highest, tl.float32), tl.full((COLUMNS,), highest, tl.float32)
        # If a row or column lies so far below it that its sum is lost, each gets its own maximum. (Last tiles come here, too:
        # rows past the end have a sum of 0.)
        if tl.minimum(tl.min(row_total, 0), tl.min(column_total, 0)) < FAINT:
            row_peak, column_peak = tl.max(logits, 1), tl.max(logits, 0)
            row_base = tl.where(row_peak == -float("inf"), 0.0, row_peak)
            column_base = tl.where(column_peak == -float("inf"), 0.0, column_peak)
            row_total = tl.sum(tl.exp(logits - row_base[:, None]), 1)
            column_total = tl.sum(tl.exp(logits - column_base[None, :]), 0)
        # 64 bits come from the tile's place, which is never a constant: of one row or column, Triton makes the sizes constants.
        row_tile, column_tile = across.to(tl.int64), down.to(tl.int64)
        tl.store(by_row + row_tile * high + rows, row_peak, row_in)
        tl.store(by_row + (row_tile + tl.cdiv(wide, COLUMNS)) * high + rows, row_total, row_in)
        tl.store(by_column + column_tile * wide + columns, column_peak, column_in)
        tl.store(by_column + (column_tile + tl.cdiv(high, ROWS)) * wide + columns, column_total, column_in)


@triton.jit
def _gradient_tile(
    image, text, row_ids, column_ids, exclude, factor, bias, row_mean, column_mean, row_share, column_share,
    row_lse, column_lse, unit, slopes, by_tile, high, wide, width, row_step, column_step,
    SIGMOID: tl.constexpr, SOME_OUT: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes slopes [high, wide]: dL/ds divided by `unit`; and by_tile [tiles, 2]: the sums of dL/ds x cosine and of dL/ds."""
    down, across = _place(high, wide, ROWS, COLUMNS)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    cosine = _cosines(image, text, rows, columns, high, wide, width, WHOLE, UPCAST, ROWS, COLUMNS, DEPTH)
    row_in, column_in = rows < high, columns < wide
    row_id, column_id = tl.load(row_ids + rows, row_in, -1), tl.load(column_ids + columns, column_in, -1)
    taking = _taking_part(row_id, column_id, exclude, rows, columns, high, wide, row_step, column_step, SOME_OUT)
    row_weight = tl.load(row_mean + rows, row_in, 0.0)
    column_weight = tl.load(column_mean + columns, column_in, 0.0)
    logits = tl.load(factor) * cosine
    if SIGMOID:
        sign = tl.where(row_id[:, None] == column_id[None, :], -1.0, 1.0)
        slope = row_weight[:, None] * column_weight[None, :] * sign * tl.sigmoid(sign * (logits + tl.load(bias)))
    else:
        row_log = tl.load(row_lse + rows, row_in, float("inf"))
        column_log = tl.load(column_lse + columns, column_in, float("inf"))
        # No logit lies above the tile's highest log-sum-exp. Usually exp(s - row) and exp(s - column) are one exponential around
        # it, times a factor for the row and one for the column.
        top = tl.max(tl.where(row_log < float("inf"), row_log, -float("inf")), 0)
        top = tl.where(top == -float("inf"), 0.0, top)
        if top - tl.minimum(tl.min(row_log, 0), tl.min(column_log, 0)) < SPREAD:
            row_part, column_part = row_weight * tl.exp(top - row_log), column_weight * tl.exp(top - column_log)
            slope = tl.exp(logits - top) * (row_part[:, None] + column_part[None, :])
        else:  # such a factor would overflow
            slope = row_weight[:, None] * tl.exp(logits - row_log[:, None])
            slope += column_weight[None, :] * tl.exp(logits - column_log[None, :])
        if _may_match(row_id, column_id):
            share = tl.load(row_share + rows, row_in, 0.0)[:, None] + tl.load(column_share + columns, column_in, 0.0)[None, :]
            slope -= tl.where(row_id[:, None] == column_id[None, :], share, 0.0)
    slope = tl.where(taking, slope, 0.0)
    tile = by_tile + 2 * tl.program_id(0)
    tl.store(tile, tl.sum(tl.sum(slope * cosine, 1), 0))
    tl.store(tile + 1, tl.sum(tl.sum(slope, 1), 0))
    at = slopes + rows[:, None].to(tl.int64) * wide + columns[None, :]
    tl.store(at, slope / tl.load(unit), row_in[:, None] & column_in[None, :])


# With TRITON_INTERPRET=1 at import, Triton runs the kernels in Python, on any device. For tests.
INTERPRETED = not isinstance(_sweep_tile, triton.JITFunction)
