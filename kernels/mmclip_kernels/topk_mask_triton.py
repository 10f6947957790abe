"""impl="triton": attention-guided masking. One program per image scores, selects exactly, and copies the kept patches.

The selection does not sort. Scores become integers of the same order. The M-th highest is found bit by bit, by counting 32 times
how many scores reach a candidate. A prefix sum gives ties to the lowest index, as in a stable sort; prefix sums also give each
patch its place. For images of many patches, a second kernel copies. There are no atomic additions: results repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmclip_kernels import tiles
from mmclip_kernels.patches import Plan

_GIVEN, _VECTOR, _TOKENS = 0, 1, 2  # where scores come from


def forward(
    patches: Tensor, token: Tensor | None, features: Tensor | None, text: Tensor | None, token_mask: Tensor | None,
    scores: Tensor | None, noise: Tensor | None, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `topk_mask_op`."""
    patches = _rows_in_line(patches)
    features = patches if features is None else _rows_in_line(features)
    rows, count, width = patches.shape
    first = patches.new_empty(rows, count if token is not None else plan.first, width)
    second = patches.new_empty(rows, plan.second, width)
    restore = torch.empty(rows, count, dtype=torch.int64, device=patches.device)
    ids = torch.empty(rows, plan.first + plan.second, dtype=torch.int64, device=patches.device)
    found = torch.empty(rows, count, dtype=torch.float32, device=patches.device)
    if rows == 0 or count == 0:
        return first, second, restore, ids, found
    tile = tiles.mask_tile(count, patches.dtype)
    fused = tile.patches <= tiles.FUSED_PATCHES
    source = _GIVEN if text is None else _VECTOR if text.ndim == 2 else _TOKENS
    how = {"SECOND": _second(plan, count), "REPLACE": token is not None, "ROWS": tile.rows, "DEPTH": tile.depth}
    _select[(rows,)](
        patches, patches.stride(0), patches.stride(1), token, features, features.stride(0), features.stride(1),
        None if text is None else text.contiguous(), None if token_mask is None else token_mask.contiguous(),
        None if scores is None else scores.contiguous(), None if noise is None else noise.contiguous(),
        first, second, restore, ids, found,
        count, width, features.shape[2], text.shape[1] if source == _TOKENS and text is not None else 1,
        plan.chosen, plan.swap, plan.first, plan.second, 1.0 / plan.temperature,
        SOURCE=source, CHOSEN_FIRST=plan.chosen_first, LOW=plan.low, SWAP=plan.swap > 0, COPY=fused, UPCAST=INTERPRETED,
        PATCHES=tile.patches, TOKEN_PATCHES=tile.token_patches, TOKENS=tile.tokens, TOKEN_DEPTH=tile.token_depth,
        num_warps=tile.token_warps if source == _TOKENS else tile.warps, **how,
    )  # fmt: skip
    if not fused:
        _copy[rows, max(triton.cdiv(first.shape[1] + plan.second, tile.rows), 1)](
            patches, patches.stride(0), patches.stride(1), token, restore, ids, found, first, second,
            count, width, plan.first, plan.second, PATCHES=tile.patches, num_warps=tiles.COPY_WARPS, **how,
        )  # fmt: skip
    return first, second, restore, ids, found


def backward(
    of_first: Tensor, of_second: Tensor, restore: Tensor, first: int, second: int, replace: bool
) -> tuple[Tensor, Tensor]:
    """See `topk_mask_backward_op`."""
    (rows, count), width = restore.shape, of_first.shape[2]
    of_patches = of_first.new_empty(rows, count, width)
    if of_patches.numel() == 0:
        return of_patches, of_first.new_zeros(width)
    tile = tiles.mask_tile(count, of_first.dtype)
    blocks = triton.cdiv(count, tile.rows)
    partial = torch.empty(rows * blocks if replace else 0, width, device=of_first.device)
    _gather_gradient[rows, blocks](
        of_first.contiguous(), of_second.contiguous(), restore, of_patches, partial, count, width, first, second,
        SECOND=second > 0, REPLACE=replace, ROWS=tile.rows, DEPTH=tile.depth, num_warps=tiles.COPY_WARPS,
    )  # fmt: skip
    return of_patches, partial.sum(0).to(of_first.dtype)


def _rows_in_line(values: Tensor) -> Tensor:
    """[B, P, D] with a contiguous last dimension. A slice of patches (for example without [CLS]) is not copied."""
    return values if values.stride(2) == 1 else values.contiguous()


def _second(plan: Plan, count: int) -> int:
    """The kernel's SECOND: the second view is 0 empty, 1 drawn by noise, 2 all patches outside the first."""
    return 0 if plan.second == 0 else 2 if plan.first + plan.second == count else 1


# -- Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _ordered(value):
    """float32 -> uint32 of the same order. NaN is highest, -0 equals 0."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where(value == value, key, 0xFFFFFFFF)


@triton.jit
def _highest(key, among, count):
    """True at the `count` highest keys where `among` is True; of equal keys, at the first ones."""
    threshold, bit = tl.full((), 0, tl.uint32), tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        reached = tl.sum((among & (key >= candidate)).to(tl.int32), 0)
        threshold = tl.where(reached >= count, candidate, threshold)
        bit = bit >> 1
    above = among & (key > threshold)
    tied = among & (key == threshold)
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def _length(squares):
    """1 / norm, from the sum of squares. The norm is at least 1e-12, as in F.normalize."""
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
def _score_rows(features, row_step, text, found, begin, count, width, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Write the cosines of ROWS patches and one vector to `found`."""
    patch = begin + tl.arange(0, ROWS)
    inside = patch < count
    at = features + patch[:, None].to(tl.int64) * row_step
    product = tl.zeros((ROWS, DEPTH), tl.float32)
    squares = tl.zeros((ROWS, DEPTH), tl.float32)
    norm = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        p = tl.load(at + depth[None, :], inside[:, None] & (depth < width)[None, :], 0.0).to(tl.float32)
        w = tl.load(text + depth, depth < width, 0.0).to(tl.float32)
        product += p * w[None, :]
        squares += p * p
        norm += w * w
    score = tl.sum(product, 1) * _length(tl.sum(squares, 1)) * _length(tl.sum(norm, 0))
    tl.store(found + patch, score, inside)


@triton.jit
def _logits(
    features, row_step, text, token, counts, patch, count, width, sharpness,
    UPCAST: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """cosine / temperature of TOKENS words and BLOCK patches. -inf after the last patch."""
    inside = patch < count
    at = features + patch[None, :].to(tl.int64) * row_step
    product = tl.zeros((TOKENS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    norm = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < width
        w = tl.load(text + token[:, None] * width + depth[None, :], counts[:, None] & deep[None, :], 0.0)
        p = tl.load(at + depth[:, None], inside[None, :] & deep[:, None], 0.0)
        wide_w, wide_p = w.to(tl.float32), p.to(tl.float32)
        norm += tl.sum(wide_w * wide_w, 1)
        squares += tl.sum(wide_p * wide_p, 0)
        if UPCAST:  # Triton 3.9's interpreter gives wrong products of two-byte types
            w, p = wide_w, wide_p
        product = tl.dot(w, p, product, input_precision="ieee")
    logits = product * (_length(norm) * sharpness)[:, None] * _length(squares)[None, :]
    return tl.where(inside[None, :], logits, -float("inf"))


@triton.jit
def _score_tokens(
    features, row_step, text, token_mask, found, count, width, tokens, sharpness, UPCAST: tl.constexpr,
    PATCHES: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write each patch's sum, over the tokens that count, of the softmax over patches to `found`. -> how many tokens count."""
    every, place = tl.arange(0, PATCHES), tl.arange(0, BLOCK)
    tl.store(found + every, tl.zeros((PATCHES,), tl.float32), every < count)
    tl.debug_barrier()  # the code below reads what other threads of this program stored
    counted = 0
    for begin in range(0, tokens, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        counts = token < tokens
        if token_mask is not None:
            counts = counts & (tl.load(token_mask + token, counts, 0) != 0)
        here = tl.sum(counts.to(tl.int32), 0)
        if here > 0:  # short texts end in blocks of padding
            counted += here
            if PATCHES == BLOCK:
                logits = _logits(
                    features, row_step, text, token, counts, place, count, width, sharpness, UPCAST, BLOCK, TOKENS, DEPTH
                )
                power = tl.exp(logits - tl.max(logits, 1)[:, None])
                share = tl.where(counts[:, None], power / tl.sum(power, 1)[:, None], 0.0)
                inside = place < count
                tl.store(found + place, tl.load(found + place, inside, 0.0) + tl.sum(share, 0), inside)
            else:  # one sweep over the patches for the softmax's maximum and sum, another for its values
                peak, total = tl.full((TOKENS,), -float("inf"), tl.float32), tl.zeros((TOKENS,), tl.float32)
                for first in range(0, count, BLOCK):
                    logits = _logits(
                        features, row_step, text, token, counts, first + place, count, width, sharpness,
                        UPCAST, BLOCK, TOKENS, DEPTH,
                    )  # fmt: skip
                    highest = tl.maximum(peak, tl.max(logits, 1))
                    total = total * tl.exp(peak - highest) + tl.sum(tl.exp(logits - highest[:, None]), 1)
                    peak = highest
                for first in range(0, count, BLOCK):
                    logits = _logits(
                        features, row_step, text, token, counts, first + place, count, width, sharpness,
                        UPCAST, BLOCK, TOKENS, DEPTH,
                    )  # fmt: skip
                    share = tl.where(counts[:, None], tl.exp(logits - peak[:, None]) / total[:, None], 0.0)
                    patch = first + place
                    inside = patch < count
                    tl.store(found + patch, tl.load(found + patch, inside, 0.0) + tl.sum(share, 0), inside)
        tl.debug_barrier()
    return counted


@triton.jit
def _copy_rows(
    patches, row_step, token, restore, ids, first_view, second_view, begin, count, width, first, second, poison,
    SECOND: tl.constexpr, REPLACE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Copy ROWS rows of an image's views, from `begin` on. poison: NaN if a score of the image is NaN, else 0."""
    row = begin + tl.arange(0, ROWS)
    if REPLACE:
        written = row < count
        patch = row
        read = written & (tl.load(restore + row, written, count) < first)
    else:
        read = row < first + second
        patch = tl.load(ids + row, read, 0)
        written = row < first
    source = patches + patch[:, None].to(tl.int64) * row_step
    target = first_view + row[:, None].to(tl.int64) * width
    other = second_view + (row - first)[:, None].to(tl.int64) * width
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = (depth < width)[None, :]
        value = tl.load(source + depth[None, :], read[:, None] & deep, 0.0)
        if REPLACE:
            filler = tl.load(token + depth, depth < width, 0.0)
            value = tl.where(read[:, None], value, filler[None, :])
        value = tl.where(poison == poison, value, poison.to(value.dtype))
        tl.store(target + depth[None, :], value, written[:, None] & deep)
        if SECOND > 0:
            tl.store(other + depth[None, :], value, (read & (row >= first))[:, None] & deep)


@triton.jit
def _poison(score, inside):
    """NaN if a score is, else 0."""
    wrong = tl.max((inside & (score != score)).to(tl.int32), 0)
    return tl.where(wrong > 0, float("nan"), 0.0)


@triton.jit
def _select(
    patches, batch_step, row_step, token, features, feature_batch_step, feature_row_step, text, token_mask, scores, noise,
    first_view, second_view, restore, ids, found, count, width, feature_width, tokens,
    chosen_count, swap, first, second, sharpness,
    SOURCE: tl.constexpr, CHOSEN_FIRST: tl.constexpr, LOW: tl.constexpr, SWAP: tl.constexpr, SECOND: tl.constexpr,
    REPLACE: tl.constexpr, COPY: tl.constexpr, UPCAST: tl.constexpr,
    PATCHES: tl.constexpr, TOKEN_PATCHES: tl.constexpr, TOKENS: tl.constexpr, TOKEN_DEPTH: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One image: compute its scores, choose patches, give each patch its place, and (if COPY) copy the views."""
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, PATCHES)
    inside = patch < count
    found, restore, ids = found + image * count, restore + image * count, ids + image * (first + second)
    features += image * feature_batch_step
    if SOURCE == 0:
        score = tl.load(scores + image * count + patch, inside, 0.0).to(tl.float32)
        tl.store(found + patch, score, inside)
    else:
        if SOURCE == 1:
            for begin in range(0, count, ROWS):
                _score_rows(
                    features, feature_row_step, text + image * feature_width, found, begin, count, feature_width, ROWS, DEPTH
                )
            tl.debug_barrier()
        else:
            masks = token_mask
            if token_mask is not None:
                masks = token_mask + image * tokens
            counted = _score_tokens(
                features, feature_row_step, text + image * tokens * feature_width, masks, found, count, feature_width, tokens,
                sharpness, UPCAST, PATCHES, TOKEN_PATCHES, TOKENS, TOKEN_DEPTH,
            )  # fmt: skip
        score = tl.load(found + patch, inside, 0.0)

    ranked = score
    if noise is not None:
        random = tl.load(noise + image * count + patch, inside, 0.0)
        if SOURCE == 2:
            ranked = tl.where(counted > 0, score, random)
    key = _ordered(ranked)
    if LOW:
        key = key ^ 0xFFFFFFFF
    chosen = _highest(key, inside, chosen_count)
    if SWAP:
        order = _ordered(random) ^ 0xFFFFFFFF
        leave = _highest(order, chosen, swap)
        enter = _highest(order, inside ^ chosen, swap)
        chosen = chosen ^ leave ^ enter
    front = chosen
    if not CHOSEN_FIRST:
        front = inside ^ chosen
    back = inside ^ front
    if SECOND == 0:
        back = front ^ front
    elif SECOND == 1:
        back = _highest(_ordered(random) ^ 0xFFFFFFFF, back, second)
    rest = inside ^ front ^ back
    place = tl.where(front, tl.cumsum(front.to(tl.int32), 0), 0)
    place += tl.where(back, tl.cumsum(back.to(tl.int32), 0) + first, 0)
    place += tl.where(rest, tl.cumsum(rest.to(tl.int32), 0) + first + second, 0) - 1
    tl.store(restore + patch, place.to(tl.int64), inside)
    tl.store(ids + place, patch.to(tl.int64), front | back)
    if COPY:
        tl.debug_barrier()
        poison = _poison(score, inside)
        seen = first
        if REPLACE:
            seen = count
        for begin in range(0, seen + second, ROWS):
            _copy_rows(
                patches + image * batch_step, row_step, token, restore, ids, first_view + image * seen * width,
                second_view + image * second * width, begin, count, width, first, second, poison,
                SECOND, REPLACE, ROWS, DEPTH,
            )  # fmt: skip


@triton.jit
def _copy(
    patches, batch_step, row_step, token, restore, ids, found, first_view, second_view, count, width, first, second,
    SECOND: tl.constexpr, REPLACE: tl.constexpr, PATCHES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Copy ROWS rows of one image's views, by the places that `_select` wrote."""
    image = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PATCHES)
    score = tl.load(found + image * count + every, every < count, 0.0)
    seen = first
    if REPLACE:
        seen = count
    _copy_rows(
        patches + image * batch_step, row_step, token, restore + image * count, ids + image * (first + second),
        first_view + image * seen * width, second_view + image * second * width, tl.program_id(1) * ROWS, count, width,
        first, second, _poison(score, every < count), SECOND, REPLACE, ROWS, DEPTH,
    )  # fmt: skip


@triton.jit
def _gather_gradient(
    of_first, of_second, restore, of_patches, of_token, count, width, first, second,
    SECOND: tl.constexpr, REPLACE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes of_patches [B, count, width]: each patch's gradient, or 0; and of_token: the sum over a program's hidden patches."""
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = patch < count
    place = tl.load(restore + image * count + patch, inside, 0).to(tl.int32)
    here, there = inside & (place < first), inside & (place >= first) & (place < first + second)
    target = of_patches + (image * count + patch)[:, None] * width
    other = of_second + (image * second + place - first)[:, None] * width
    if REPLACE:
        source = of_first + (image * count + patch)[:, None] * width
    else:
        source = of_first + (image * first + place)[:, None] * width
    partial = of_token + (image * tl.num_programs(1) + tl.program_id(1)) * width
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = (depth < width)[None, :]
        if REPLACE:
            value = tl.load(source + depth[None, :], inside[:, None] & deep, 0.0)
            hidden = tl.where(here[:, None], 0.0, value.to(tl.float32))
            tl.store(partial + depth, tl.sum(hidden, 0), depth < width)
            value = tl.where(here[:, None], value, 0.0)
        else:
            value = tl.load(source + depth[None, :], here[:, None] & deep, 0.0)
            if SECOND:
                value += tl.load(other + depth[None, :], there[:, None] & deep, 0.0)
        tl.store(target + depth[None, :], value, inside[:, None] & deep)


# With TRITON_INTERPRET=1 at import, Triton runs the kernels in Python, on any device. For tests.
INTERPRETED = not isinstance(_select, triton.JITFunction)
