"""impl="triton": the forward and backward sweep of the contrastive loss as fused kernels, one program for each tile of logits.

There are no atomic additions. Each tile writes its own partials, which are then summed in a fixed order: results repeat bit for
bit. `contrastive_torch` computes the same in PyTorch; `contrastive` calls one or the other.
"""

# mypy: disallow-untyped-defs=false
# (arguments of Triton kernels have no Python types)

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from mmclip_kernels import tiles
from mmclip_kernels.pairs import LogSums, Mode, Pairs, Partials

# About 2^-86. A sum of exponentials below this is computed again around its own maximum: float32 ends at 1e-38, so the terms of
# such a small sum may have lost digits.
FAINT = tl.constexpr(1e-26)
# The kernels compute powers of 2.
LOG2E = tl.constexpr(math.log2(math.e))
# If a log-sum-exp (in base 2) lies this far below the highest of its tile, rows and columns get separate exponentials. 2^86 does
# not overflow.
SPREAD = tl.constexpr(86.0)


def kept_size(rows: int, columns: int, device: torch.device) -> int:
    """The backward sweep computes all products again."""
    return 0


def sweep(image: Tensor, text: Tensor, pairs: Pairs, mode: Mode) -> Partials:
    """-> log-sum-exp partials of every row and column, in base 2, and the loss's sums over positives. See `Partials`."""
    device = image.device
    tile = tiles.logits_tile("sweep", image.dtype, pairs.exclude is not None or mode == "sigmoid", _architecture())
    image, text, options = _whole(image, tile), _whole(text, tile), _options(tile, pairs, image.dtype)
    blocks = list(_blocks(len(image), len(text), tiles.SWEEP_BLOCK))
    counts = [triton.cdiv(len(image[here]), tile.rows) * triton.cdiv(len(text[there]), tile.columns) for here, there in blocks]
    if blocks:
        rows, columns = (LogSums(*torch.empty(2, len(x), device=device)) for x in (image, text))
    else:
        rows, columns = (LogSums.empty(len(x), torch.float32, device) for x in (image, text))
    by_tile = torch.empty(sum(counts), 1 if mode == "sigmoid" else 3, dtype=torch.float64, device=device)
    for (here, there), count, own in zip(blocks, counts, by_tile.split(counts), strict=True):
        high, wide = here.stop - here.start, there.stop - there.start
        exclude, row_step, column_step = _exclusions(pairs, here, there)
        features = *_tiled(image[here], text[there], tile), pairs.row_ids[here], pairs.column_ids[there], exclude, pairs.factor
        sizes = high, wide, image.shape[1], row_step, column_step
        if mode == "sigmoid":
            weights = pairs.bias, pairs.row_mean[here], pairs.column_mean[there]
            _sigmoid_tile[(count,)](*features, *weights, own, *sizes, **options)
            continue
        down, across = triton.cdiv(high, tile.rows), triton.cdiv(wide, tile.columns)
        by_row, by_column = torch.empty(2, across, high, device=device), torch.empty(2, down, wide, device=device)
        shares = pairs.row_share[here], pairs.column_share[there]
        _sweep_tile[(count,)](*features, by_row, by_column, own, *sizes, **options)
        _rare_tile[(count,)](*features, *shares, by_row, by_column, own, *sizes, **options | {"num_warps": tiles.RARE_WARPS})
        _merge_tiles[(triton.cdiv(high, tiles.MERGED) + triton.cdiv(wide, tiles.MERGED),)](
            by_row, by_column, rows.peak[here], rows.total[here], columns.peak[there], columns.total[there], high, wide,
            NEW_ROWS=there.start == 0, NEW_COLUMNS=here.start == 0, ROWS=tile.rows, COLUMNS=tile.columns, SIZE=tiles.MERGED,
        )  # fmt: skip
    if mode == "sigmoid":
        return Partials(rows, columns, by_tile.sum().expand(2))
    return Partials(rows, columns, by_tile[:, :2].sum(0) * math.log(2))


def gradient(
    image: Tensor, text: Tensor, pairs: Pairs, mode: Mode, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d(loss)/d(image [N, E], text [M, E], factor [], bias []). The weights in `pairs` already hold the upstream gradient, and
    are in `pairs.unit`; log-sum-exps are in base 2."""
    assert pairs.unit is not None
    tile = tiles.logits_tile("gradient", image.dtype, pairs.exclude is not None or mode == "sigmoid", _architecture())
    width = image.shape[1]
    image, text = _whole(image, tile), _whole(text, tile)
    wide = tiles.GRADIENT_BLOCK[1] * 2 // image.element_size()
    blocks = list(_blocks(len(image), len(text), (tiles.GRADIENT_BLOCK[0], wide)))
    counts = [triton.cdiv(len(image[here]), tile.rows) * triton.cdiv(len(text[there]), tile.columns) for here, there in blocks]
    image_grad, text_grad = ((torch.empty if blocks else torch.zeros)(x.shape, device=x.device) for x in (image, text))
    by_tile = torch.empty(sum(counts), 2, device=image.device)
    for (here, there), count, own in zip(blocks, counts, by_tile.split(counts), strict=True):
        images, texts = image[here], text[there]
        slope = torch.empty(len(images), len(texts), dtype=image.dtype, device=image.device)
        exclude, row_step, column_step = _exclusions(pairs, here, there)
        _gradient_tile[(count,)](
            *_tiled(images, texts, tile), pairs.row_ids[here], pairs.column_ids[there], exclude, pairs.factor, pairs.bias,
            pairs.row_mean[here], pairs.column_mean[there], pairs.row_share[here], pairs.column_share[there],
            row_lse[here], column_lse[there], pairs.unit, slope, own,
            len(images), len(texts), image.shape[1], row_step, column_step,
            SIGMOID=mode == "sigmoid", **_options(tile, pairs, image.dtype),
        )  # fmt: skip
        _add_product(image_grad[here], slope, texts, new=there.start == 0)
        _add_product(text_grad[there], slope.T, images, new=here.start == 0)
    of_factor = pairs.unit[1]
    return image_grad.mul_(of_factor)[:, :width], text_grad.mul_(of_factor)[:, :width], *by_tile.sum(0)


def _architecture() -> int:
    """What the kernels are compiled for: 90 for sm_90, 0 for the interpreter."""
    return 0 if INTERPRETED else int(driver.active.get_current_target().arch)


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


def _whole(features: Tensor, tile: tiles.Tile) -> Tensor:
    """Features with zeros up to a multiple of the tile's depth, from an address that a descriptor may have."""
    missing = -features.shape[1] % tile.depth
    if missing:
        return torch.nn.functional.pad(features, (0, missing))
    features = features.contiguous()
    return features if features.data_ptr() % 16 == 0 else features.clone()


def _described(dtype: torch.dtype) -> bool:
    """Whether features are copied by tensor descriptors: from sm_90 on, one instruction of one thread for each step. sm_80 has
    none, and what Triton puts in their place is not asynchronous. In float32 they would spill."""
    return dtype != torch.float32 and (INTERPRETED or _architecture() >= 90)


def _tiled(image: Tensor, text: Tensor, tile: tiles.Tile) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    if not _described(image.dtype):
        return image, text
    return (
        TensorDescriptor.from_tensor(image, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(text, [tile.columns, tile.depth]),
    )


def _options(tile: tiles.Tile, pairs: Pairs, dtype: torch.dtype) -> dict[str, int | bool]:
    return {
        "SOME_OUT": pairs.some_out, "DESCRIBED": _described(dtype), "UPCAST": INTERPRETED,
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, new: bool) -> None:
    """Add a matrix product, which is summed in float32 whatever the type of its factors, to `total`; new: put it there."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, beta=0 if new else 1, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left.float(), right.float(), beta=0 if new else 1, out=total)


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
    image, text, down, across, high, wide, width,
    DESCRIBED: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """<image_i, text_j> of a tile, in float32; width is a multiple of DEPTH. Past the end, where a descriptor gives zeros and an
    address the last row again, the caller must mask them."""
    cosine = tl.zeros((ROWS, COLUMNS), tl.float32)
    if not DESCRIBED:
        row = tl.minimum(down * ROWS + tl.arange(0, ROWS), high - 1).to(tl.int64)
        column = tl.minimum(across * COLUMNS + tl.arange(0, COLUMNS), wide - 1).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        image_at = image + row[:, None] * width + depth[None, :]
        text_at = text + column[None, :] * width + depth[:, None]
    for at in range(0, width, DEPTH):
        if DESCRIBED:
            a, b = image.load([down * ROWS, at]), text.load([across * COLUMNS, at]).T
        else:
            a, b = tl.load(image_at), tl.load(text_at)
            image_at += DEPTH
            text_at += DEPTH
        if UPCAST:  # Triton 3.9's interpreter gives wrong products of two-byte types
            a, b = a.to(tl.float32), b.to(tl.float32)
        cosine = tl.dot(a, b, cosine, input_precision="ieee")
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
def _logits(
    image, text, row_ids, column_ids, exclude, factor, down, across, high, wide, width, row_step, column_step,
    SOME_OUT: tl.constexpr, DESCRIBED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """-> the logits of a tile in base 2, -inf for pairs that are left out; cosines; ids; and which rows and columns take part.

    An addition of 0 or -inf for each row and column costs half of what a mask does.
    """
    cosine = _cosines(image, text, down, across, high, wide, width, DESCRIBED, UPCAST, ROWS, COLUMNS, DEPTH)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    row_in, column_in = rows < high, columns < wide
    row_id, column_id = tl.load(row_ids + rows, row_in, -1), tl.load(column_ids + columns, column_in, -1)
    row_takes, column_takes = row_in & (row_id >= 0), column_in & (column_id >= 0)
    logits = cosine * (tl.load(factor) * LOG2E)
    if exclude is not None:
        taking = _taking_part(row_id, column_id, exclude, rows, columns, high, wide, row_step, column_step, SOME_OUT)
        logits = tl.where(taking, logits, -float("inf"))
    else:
        logits = logits + tl.where(row_takes, 0.0, -float("inf"))[:, None]
        logits = logits + tl.where(column_takes, 0.0, -float("inf"))[None, :]
    return logits, cosine, row_id, column_id, row_takes, column_takes


@triton.jit
def _store_sums(
    by_row, by_column, down, across, rows, columns, high, wide, row_peak, row_sum, column_peak, column_sum,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # 64 bits come from the tile's place, which is never a constant: of one row or column, Triton makes the sizes constants.
    row_tile, column_tile = across.to(tl.int64), down.to(tl.int64)
    row_in, column_in = rows < high, columns < wide
    tl.store(by_row + row_tile * high + rows, row_peak, row_in)
    tl.store(by_row + (row_tile + tl.cdiv(wide, COLUMNS)) * high + rows, row_sum, row_in)
    tl.store(by_column + column_tile * wide + columns, column_peak, column_in)
    tl.store(by_column + (column_tile + tl.cdiv(high, ROWS)) * wide + columns, column_sum, column_in)


@triton.jit
def _sweep_tile(
    image, text, row_ids, column_ids, exclude, factor, by_row, by_column, by_tile, high, wide, width, row_step, column_step,
    SOME_OUT: tl.constexpr, DESCRIBED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes by_row [2, tiles across, high] and by_column [2, tiles down, wide]: (maximum, sum of powers) of each tile's rows and
    columns; and by_tile [tiles, 3]: the tile's part of the loss outside the log-sum-exps, in base 2, for rows and for columns, so
    far 0, and what `_rare_tile` has to do: 1 to compute its sums again, 2 if it may hold positives, 3 both, else 0."""
    down, across = _place(high, wide, ROWS, COLUMNS)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    logits, _, row_id, column_id, row_takes, column_takes = _logits(
        image, text, row_ids, column_ids, exclude, factor, down, across, high, wide, width, row_step, column_step,
        SOME_OUT, DESCRIBED, UPCAST, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    # Usually one exponential, around the tile's maximum, serves the sums of rows and columns.
    highest = tl.max(tl.max(logits, 1), 0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    power = tl.exp2(logits - highest)
    row_sum, column_sum = tl.sum(power, 1), tl.sum(power, 0)
    # A row or column that takes part may lie so far below it that its sum is lost.
    faintest = tl.minimum(tl.min(tl.where(row_takes, row_sum, 1.0), 0), tl.min(tl.where(column_takes, column_sum, 1.0), 0))
    tile = by_tile + 3 * tl.program_id(0)
    tl.store(tile, 0.0)
    tl.store(tile + 1, 0.0)
    tl.store(tile + 2, tl.where(faintest < FAINT, 1.0, 0.0) + tl.where(_may_match(row_id, column_id), 2.0, 0.0))
    row_peak, column_peak = tl.full((ROWS,), highest, tl.float32), tl.full((COLUMNS,), highest, tl.float32)
    _store_sums(
        by_row, by_column, down, across, rows, columns, high, wide, row_peak, row_sum, column_peak, column_sum, ROWS, COLUMNS
    )  # fmt: skip


@triton.jit
def _rare_tile(
    image, text, row_ids, column_ids, exclude, factor, row_share, column_share,
    by_row, by_column, by_tile, high, wide, width, row_step, column_step,
    SOME_OUT: tl.constexpr, DESCRIBED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What `_sweep_tile` marked: a tile's sums, each around its own maximum; its positives. In a kernel of its own, because this
    code would take registers of every tile."""
    tile = by_tile + 3 * tl.program_id(0)
    task = tl.load(tile + 2)
    if task > 0:
        down, across = _place(high, wide, ROWS, COLUMNS)
        rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
        logits, _, row_id, column_id, _, _ = _logits(
            image, text, row_ids, column_ids, exclude, factor, down, across, high, wide, width, row_step, column_step,
            SOME_OUT, DESCRIBED, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        if task >= 2:  # in float64: the loss is a small difference of these and the log-sum-exps
            pull = tl.where((row_id[:, None] == column_id[None, :]) & (logits > -float("inf")), logits, 0.0)
            of_rows = tl.sum(pull, 1) * tl.load(row_share + rows, rows < high, 0.0)
            of_columns = tl.sum(pull * tl.load(column_share + columns, columns < wide, 0.0)[None, :], 1)
            tl.store(tile, -tl.sum(of_rows.to(tl.float64), 0))
            tl.store(tile + 1, -tl.sum(of_columns.to(tl.float64), 0))
        if (task == 1) | (task == 3):
            row_peak, column_peak = tl.max(logits, 1), tl.max(logits, 0)
            row_peak = tl.where(row_peak == -float("inf"), 0.0, row_peak)
            column_peak = tl.where(column_peak == -float("inf"), 0.0, column_peak)
            row_sum = tl.sum(tl.exp2(logits - row_peak[:, None]), 1)
            column_sum = tl.sum(tl.exp2(logits - column_peak[None, :]), 0)
            _store_sums(
                by_row, by_column, down, across, rows, columns, high, wide, row_peak, row_sum, column_peak, column_sum,
                ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit
def _merge(partials, peak, total, block, tiles, count, NEW: tl.constexpr, SIZE: tl.constexpr):
    """Add the (maximum, sum) of each tile, partials [2, tiles, count], to those of `SIZE` rows or columns."""
    TILES: tl.constexpr = 32
    at = block * SIZE + tl.arange(0, SIZE)
    inside = at < count
    highest, whole = tl.full((SIZE,), -float("inf"), tl.float32), tl.zeros((SIZE,), tl.float32)
    if not NEW:
        highest, whole = tl.load(peak + at, inside, 0.0), tl.load(total + at, inside, 0.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        taken = (tile < tiles)[:, None] & inside[None, :]
        base = tl.load(partials + tile[:, None] * count + at[None, :], taken, -float("inf"))
        sums = tl.load(partials + (tile + tiles)[:, None] * count + at[None, :], taken, 0.0)
        above = tl.maximum(highest, tl.max(base, 0))
        whole = whole * tl.exp2(highest - above) + tl.sum(sums * tl.exp2(base - above[None, :]), 0)
        highest = above
    tl.store(peak + at, highest, inside)
    tl.store(total + at, whole, inside)


@triton.jit
def _merge_tiles(
    by_row, by_column, row_peak, row_total, column_peak, column_total, high, wide,
    NEW_ROWS: tl.constexpr, NEW_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The (maximum, sum) of a block's rows and columns, of all its tiles, together with those of the blocks before."""
    block, of_rows = tl.program_id(0), tl.cdiv(high, SIZE)
    if block < of_rows:
        _merge(by_row, row_peak, row_total, block, tl.cdiv(wide, COLUMNS), high, NEW_ROWS, SIZE)
    else:
        _merge(by_column, column_peak, column_total, block - of_rows, tl.cdiv(high, ROWS), wide, NEW_COLUMNS, SIZE)


@triton.jit
def _sigmoid_tile(
    image, text, row_ids, column_ids, exclude, factor, bias, row_mean, column_mean, by_tile,
    high, wide, width, row_step, column_step,
    SOME_OUT: tl.constexpr, DESCRIBED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes by_tile [tiles]: the tile's part of the sigmoid loss."""
    down, across = _place(high, wide, ROWS, COLUMNS)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    cosine = _cosines(image, text, down, across, high, wide, width, DESCRIBED, UPCAST, ROWS, COLUMNS, DEPTH)
    row_in, column_in = rows < high, columns < wide
    row_id, column_id = tl.load(row_ids + rows, row_in, -1), tl.load(column_ids + columns, column_in, -1)
    taking = _taking_part(row_id, column_id, exclude, rows, columns, high, wide, row_step, column_step, SOME_OUT)
    matched = row_id[:, None] == column_id[None, :]
    signed = (tl.load(factor) * cosine + tl.load(bias)) * tl.where(matched, -1.0, 1.0)
    rest = tl.exp(-tl.abs(signed))  # log(1 + rest) below must not lose a small rest to rounding
    above = 1.0 + rest
    log = tl.where(above == 1.0, rest, tl.log(above) * (rest / tl.where(above == 1.0, 1.0, above - 1.0)))
    cost = tl.maximum(signed, 0.0) + log
    row_weight = tl.load(row_mean + rows, row_in, 0.0)
    column_weight = tl.load(column_mean + columns, column_in, 0.0)
    whole = tl.sum(tl.sum(tl.where(taking, row_weight[:, None] * column_weight[None, :] * cost, 0.0), 1), 0)
    tl.store(by_tile + tl.program_id(0), whole)


@triton.jit
def _gradient_tile(
    image, text, row_ids, column_ids, exclude, factor, bias, row_mean, column_mean, row_share, column_share,
    row_lse, column_lse, unit, slopes, by_tile, high, wide, width, row_step, column_step,
    SIGMOID: tl.constexpr, SOME_OUT: tl.constexpr, DESCRIBED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes slopes [high, wide]: dL/ds in the unit of the weights; and by_tile [tiles, 2]: the sums of dL/ds x cosine and of
    dL/ds, in no unit."""
    down, across = _place(high, wide, ROWS, COLUMNS)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    logits, cosine, row_id, column_id, _, _ = _logits(
        image, text, row_ids, column_ids, exclude, factor, down, across, high, wide, width, row_step, column_step,
        SOME_OUT, DESCRIBED, UPCAST, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    row_in, column_in = rows < high, columns < wide
    row_weight = tl.load(row_mean + rows, row_in, 0.0)
    column_weight = tl.load(column_mean + columns, column_in, 0.0)
    if SIGMOID:
        sign = tl.where(row_id[:, None] == column_id[None, :], -1.0, 1.0)
        signed = sign * (tl.load(factor) * cosine + tl.load(bias))
        slope = row_weight[:, None] * column_weight[None, :] * sign * tl.sigmoid(signed)
    else:
        row_log = tl.load(row_lse + rows, row_in, float("inf"))
        column_log = tl.load(column_lse + columns, column_in, float("inf"))
        # No logit lies above the tile's highest log-sum-exp. Usually 2^(s - row) and 2^(s - column) are one exponential around
        # it, times a factor for the row and one for the column.
        top = tl.max(tl.where(row_log < float("inf"), row_log, -float("inf")), 0)
        top = tl.where(top == -float("inf"), 0.0, top)
        if top - tl.minimum(tl.min(row_log, 0), tl.min(column_log, 0)) < SPREAD:
            row_part, column_part = row_weight * tl.exp2(top - row_log), column_weight * tl.exp2(top - column_log)
            slope = tl.exp2(logits - top) * (row_part[:, None] + column_part[None, :])
        else:  # such a factor would overflow
            slope = row_weight[:, None] * tl.exp2(logits - row_log[:, None])
            slope += column_weight[None, :] * tl.exp2(logits - column_log[None, :])
        if _may_match(row_id, column_id):
            share = tl.load(row_share + rows, row_in, 0.0)[:, None] + tl.load(column_share + columns, column_in, 0.0)[None, :]
            slope -= tl.where((row_id[:, None] == column_id[None, :]) & (logits > -float("inf")), share, 0.0)
    if SIGMOID:  # in softmax mode 2^-inf is 0
        slope = tl.where(logits > -float("inf"), slope, 0.0)
    tile = by_tile + 2 * tl.program_id(0)
    tl.store(tile, tl.sum(tl.sum(slope * cosine, 1), 0) * tl.load(unit))
    tl.store(tile + 1, tl.sum(tl.sum(slope, 1), 0) * tl.load(unit) if SIGMOID else 0.0)
    at = slopes + rows[:, None].to(tl.int64) * wide + columns[None, :]
    tl.store(at, slope, row_in[:, None] & column_in[None, :])


# With TRITON_INTERPRET=1 at import, Triton runs the kernels in Python, on any device. For tests.
INTERPRETED = not isinstance(_sweep_tile, triton.JITFunction)
