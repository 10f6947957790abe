"""The contrastive loss of the global batch. Each logit is computed once across all ranks.

With s_ij = scale <image_i, text_j>, P_ij = 1 where image i and text j share a group id, n_i = sum_j P_ij, m_j = sum_i P_ij,
and weights u_i, v_j (1 by default), the loss in softmax mode is

    L_rows    = sum_i u_i (lse_j s_ij - sum_j P_ij s_ij / n_i) / sum_i u_i      over the rows i with n_i > 0
    L_columns = sum_j v_j (lse_i s_ij - sum_i P_ij s_ij / m_j) / sum_j v_j      over the columns j with m_j > 0
    L         = (L_rows + L_columns) / 2

and in sigmoid mode (SigLIP, arXiv 2303.15343), with z_ij = 1 for positives and -1 for other pairs:

    L = sum_ij u_i v_j log(1 + exp(-z_ij (s_ij + bias))) / sum_i u_i

Each rank owns its image rows. The forward sweep over all texts gives the log-sum-exps of these rows, and for each column a
(maximum, sum) partial; partials are combined over the ranks. The backward sweep computes dL/ds again, block by block. The ranks'
partial gradients of the texts are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mmclip_kernels.implementation import Impl, implementation
from mmclip_kernels.pairs import LogSums, Mode, Pairs, finite
from mmclip_kernels.ranks import Group, Shards, all_reduce, gather_rows, rank_sizes


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
    mode: Mode = "softmax",
    directions: bool = False,
    impl: Impl = "torch",
    group: Group = None,
    sizes: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Symmetric multi-positive InfoNCE, or SigLIP, of image [N, E] and text [M, E] (L2-normalised by the caller) -> [].

    scale: the factor on the cosines, not its logarithm. Shape [] or [1].
    bias: added to the scaled cosines, in sigmoid mode only. Shape [] or [1].
    image_ids [N], text_ids [M]: int64 group ids. An image and a text with the same id are positives. A row with an id < 0 is left
      out: it is no positive, no negative, and its features may hold anything. Both None: the diagonal (N = M).
    row_weight [N], col_weight [M]: floats >= 0, the weights of the rows and columns in their means. No gradient.
    exclude: bool, broadcastable to [N, M]. True leaves a pair out, as a positive and in the denominators.
    directions: return the two halves [2] (over image rows, over text columns) instead of their mean. Softmax mode only.
    impl: "torch" runs on any device, in blocks, without N x M memory. "triton" is fused and needs CUDA tensors.
    group: the ranks whose rows form one batch; N and M may differ between ranks. None: this process alone. With a group, ids are
      global (None: the diagonal of each rank), and the columns of `exclude` are the texts of all ranks in rank order. Every
      rank returns the global loss. Gradients are scaled for engines that *average* parameter gradients over the ranks: the
      average is exactly the gradient of the global loss, also for the scale.
    sizes: (N of each rank, M of each rank), where the caller knows them. None: gathered, and the host waits for the device once.

    -> float32 (float64 for float64 features). Without any positive pair the loss and all gradients are 0. NaN or infinite
    features give NaN, and so does a scale or bias that is not finite (on a CPU, where reading it costs nothing, ValueError).
    ValueError for arguments that do not fit. Weights are passed on all ranks or on none.
    """
    diagonal = image_ids is None and text_ids is None
    _check(image, text, scale, bias, image_ids, text_ids, mode, impl)
    _check_device(image, text, scale, bias, image_ids, text_ids, row_weight, col_weight, exclude)
    if diagonal:
        rank = dist.get_rank(group) if group is not None else 0
        image_ids = text_ids = torch.arange(len(image), device=image.device) + (rank << 40)
    assert image_ids is not None and text_ids is not None
    _check_weights(row_weight, col_weight, image_ids, text_ids)
    row_sizes, column_sizes = sizes or rank_sizes([len(image), len(text)], group, image.device)
    if exclude is not None:
        exclude = _broadcast(exclude, len(image), sum(column_sizes))
    if directions and mode == "sigmoid":
        raise ValueError("the sigmoid loss has no directions: leave directions=False")
    if bias is None:
        bias = torch.zeros_like(scale)
    arguments = (image, text, scale, bias, image_ids, text_ids, row_weight, col_weight, exclude, diagonal, mode, impl)
    losses: Tensor = contrastive_op(*arguments)[0] if group is None else _OverRanks.apply(
        *arguments, group, row_sizes, column_sizes
    )  # fmt: skip
    return losses if directions else losses.mean()


# -- Checks -------------------------------------------------------------------------------------------------------------


def _check(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None,
    mode: str, impl: str,
) -> None:  # fmt: skip
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"image [N, E] and text [M, E] must share E, found {list(image.shape)}, {list(text.shape)}")
    if image.dtype != text.dtype or not image.is_floating_point():
        raise ValueError(f"image and text must share a floating dtype, found {image.dtype} and {text.dtype}; cast one")
    if impl == "triton" and image.dtype == torch.float64:
        raise ValueError("impl='triton' takes float32, bfloat16 and float16; use impl='torch' for float64")
    if mode not in ("softmax", "sigmoid"):
        raise ValueError(f"mode={mode!r} is unknown; use 'softmax' or 'sigmoid'")
    if bias is not None and mode != "sigmoid":
        raise ValueError("bias belongs to mode='sigmoid'; the softmax does not see it")
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and (not isinstance(value, Tensor) or value.numel() != 1):
            raise ValueError(f"{name} must be a tensor that holds one number, found {_shape(value)}")
    if image_ids is None or text_ids is None:
        if image_ids is not text_ids or len(image) != len(text):
            raise ValueError("pass both image_ids and text_ids, or neither with as many images as texts")
    elif image_ids.shape != image.shape[:1] or text_ids.shape != text.shape[:1]:
        raise ValueError(
            f"one id a row: {len(image)} images and {len(text)} texts, "
            f"but ids of shape {list(image_ids.shape)} and {list(text_ids.shape)}"
        )
    elif image_ids.dtype != torch.int64 or text_ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, found {image_ids.dtype} and {text_ids.dtype}")


def _check_device(*tensors: Tensor | None) -> None:
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, found {sorted(devices)}")


def _shape(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_weights(row: Tensor | None, column: Tensor | None, image_ids: Tensor, text_ids: Tensor) -> None:
    for name, weight, ids in (("row_weight", row, image_ids), ("col_weight", column, text_ids)):
        if weight is not None and (weight.shape != ids.shape or not weight.is_floating_point()):
            raise ValueError(f"{name} must be floats of shape {list(ids.shape)}, found {weight.dtype} {_shape(weight)}")


def _broadcast(exclude: Tensor, rows: int, columns: int) -> Tensor:
    fits = exclude.ndim == 2 and exclude.shape[0] in (1, rows) and exclude.shape[1] in (1, columns)
    if exclude.dtype != torch.bool or not fits:
        raise ValueError(
            f"exclude must be bool [{rows}, {columns}], or 1 in place of either, found {exclude.dtype} {_shape(exclude)}"
        )
    return exclude.expand(rows, columns)


# -- Forward and backward, over any number of ranks ---------------------------------------------------------------------


def _forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: Mode, impl: Impl,
    group: Group, row_sizes: Sequence[int], column_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> losses [2] of rows and columns; log-sum-exps [2, N] of this rank's rows and [2, M] of all ranks' columns."""
    kernels = implementation("contrastive", impl, image.device)
    for name, value in (("scale", scale), ("bias", bias)):
        if value.device.type == "cpu" and not math.isfinite(float(value)):  # on a card this would wait for it
            raise ValueError(f"{name} must be finite, found {float(value)}")
    if not diagonal:
        image, text = _taking_part(image, image_ids), _taking_part(text, text_ids)
    pairs, shards = _relate(
        image, scale, bias, image_ids, text_ids, row_weight, col_weight, exclude, diagonal, mode, group, row_sizes,
        column_sizes,
    )  # fmt: skip
    precise = pairs.factor.dtype
    everything = len(pairs.column_ids)
    columns = LogSums.empty(everything + 1, precise, image.device)  # the last place is for padding
    rows = LogSums.empty(len(image), precise, image.device)
    # float64, because the loss is a small difference of two large means: of the log-sum-exps and of the positives' logits.
    total = (_poison(image, text, torch.float64) + 0 * (pairs.factor + pairs.bias)).repeat(2)
    for texts, place in zip(shards.gather(text), shards.columns, strict=True):
        part = kernels.sweep(image, texts, _columns(pairs, place), mode)
        total += part.total
        if mode == "softmax":
            rows.merge(slice(None), part.rows.peak, part.rows.total)
            columns.merge(place, part.columns.peak, part.columns.total)
    if mode == "sigmoid":
        total = all_reduce(total, group).to(precise)
        return total, rows.peak.new_zeros(2, len(image)), rows.peak.new_zeros(2, everything)
    column_peak, column_total = columns.peak[:everything], columns.total[:everything]
    peak = all_reduce(column_peak, group, dist.ReduceOp.MAX)
    column_lse = _log_sum(peak, all_reduce(column_total * (column_peak - finite(peak)).exp(), group))
    row_lse = _log_sum(rows.peak, rows.total)
    total[0] += _dot(pairs.row_mean, row_lse)
    total = all_reduce(total, group)
    total[1] += _dot(pairs.column_mean, column_lse)
    return total.to(precise), row_lse, column_lse


def _backward(
    upstream: Tensor, losses: Tensor, row_lse: Tensor, column_lse: Tensor,
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: Mode, impl: Impl,
    group: Group, row_sizes: Sequence[int], column_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """upstream [2] -> gradients of image, text, scale and bias. Computes the logits again: only log-sum-exps were saved."""
    kernels = implementation("contrastive", impl, image.device)
    kept = image, text
    if not diagonal:
        image, text = _taking_part(image, image_ids), _taking_part(text, text_ids)
    pairs, shards = _relate(
        image, scale, bias, image_ids, text_ids, row_weight, col_weight, exclude, diagonal, mode, group, row_sizes,
        column_sizes,
    )  # fmt: skip
    world = dist.get_world_size(group) if group is not None else 1
    precise = pairs.factor.dtype
    rows, columns = world * (upstream.to(precise) + 0 * losses)  # a loss of NaN makes all gradients NaN
    (row_lse, row_rest), (column_lse, column_rest) = row_lse, column_lse
    if mode == "sigmoid":
        pairs = replace(pairs, row_mean=(rows + columns) * pairs.row_mean)
    else:
        pairs = replace(
            pairs,
            row_mean=rows * pairs.row_mean * (-row_rest).exp(), row_share=rows * pairs.row_share,
            column_mean=columns * pairs.column_mean * (-column_rest).exp(), column_share=columns * pairs.column_share,
        )  # fmt: skip
    # Rows without any pair have a log-sum-exp of -inf. With +inf instead, exp(s - inf) is 0, and the fused kernel keeps its
    # common branch.
    row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf)
    column_lse = torch.cat([column_lse.masked_fill(column_lse == -torch.inf, torch.inf), column_lse.new_zeros(1)])
    image_grad: Tensor | None = None
    factor_grad, bias_grad = torch.zeros(2, dtype=precise, device=image.device)

    def text_gradients() -> Iterator[Tensor]:
        nonlocal image_grad, factor_grad, bias_grad
        for texts, place in zip(shards.gather(text), shards.columns, strict=True):
            piece = _columns(pairs, place)
            lse = column_lse[place]
            of_image, of_text, of_factor, of_bias = kernels.gradient(image, texts, piece, mode, row_lse, lse)
            image_grad = of_image if image_grad is None else image_grad.add_(of_image)
            del of_image
            factor_grad, bias_grad = factor_grad + of_factor, bias_grad + of_bias
            yield of_text

    text_grad = shards.reduce(text_gradients())
    assert image_grad is not None
    return (
        image_grad.to(kept[0].dtype), text_grad.to(kept[1].dtype),
        factor_grad.reshape(scale.shape).to(scale.dtype), bias_grad.reshape(bias.shape).to(bias.dtype),
    )  # fmt: skip


def _relate(
    image: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: Mode, group: Group,
    row_sizes: Sequence[int], column_sizes: Sequence[int],
) -> tuple[Pairs, Shards]:  # fmt: skip
    """-> the pairs of this rank's rows and all ranks' columns, and how the columns are spread over the ranks."""
    precise = torch.promote_types(torch.float32, image.dtype)  # float64 stays float64: gradcheck needs it
    column_ids = gather_rows(text_ids, group, column_sizes)
    weight = torch.ones(len(image_ids), dtype=precise, device=image.device) if row_weight is None else row_weight
    column_weight = torch.ones_like(column_ids, dtype=precise)
    if col_weight is not None:
        column_weight = gather_rows(col_weight.to(precise), group, column_sizes)
    if mode == "sigmoid":
        row_use, column_mean = weight.to(precise) * (image_ids >= 0), column_weight
        counts = row_use, column_mean
    else:
        counts = _positives(image_ids, column_ids, exclude, diagonal, precise, group, row_sizes)
        row_use = weight.to(precise) * (counts[0] > 0)
        column_mean = _share(column_weight * (counts[1] > 0), None)
    row_mean = _share(row_use, group)
    shards = Shards(column_sizes, group, image.device)
    row_places, column_places = _places(image_ids, column_ids)
    pairs = Pairs(
        row_ids=row_places, column_ids=column_places, some_out=not diagonal or shards.padded, exclude=exclude,
        factor=scale.detach().reshape(()).to(precise), bias=bias.detach().reshape(()).to(precise),
        row_mean=row_mean, column_mean=column_mean,
        row_share=row_mean / counts[0].clamp(min=1), column_share=column_mean / counts[1].clamp(min=1),
    )  # fmt: skip
    return pairs, shards


def _share(weight: Tensor, group: Group) -> Tensor:
    """Each row's share of the sum of weights over all ranks. All 0 if that sum is 0."""
    total = all_reduce(weight.sum(), group)
    return torch.where(total > 0, weight / total, 0)


def _positives(
    row_ids: Tensor, column_ids: Tensor, exclude: Tensor | None, diagonal: bool, precise: torch.dtype, group: Group,
    row_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """-> how many positives each of this rank's rows has among all columns, and each column among all rows."""
    if exclude is not None:
        of_rows = torch.zeros(len(row_ids), dtype=precise, device=row_ids.device)
        of_columns = torch.zeros(len(column_ids), dtype=precise, device=row_ids.device)
        step = max(1, (1 << 24) // max(len(column_ids), 1))  # at most 16 MiB of pairs at once
        for start in range(0, len(row_ids), step):
            here = slice(start, start + step)
            positive = (row_ids[here, None] == column_ids) & (column_ids >= 0) & ~exclude[here]
            of_rows[here] = positive.sum(1).to(precise)
            of_columns += positive.sum(0)
        return of_rows, all_reduce(of_columns, group)
    if diagonal:
        return torch.ones_like(row_ids, dtype=precise), torch.ones_like(column_ids, dtype=precise)
    all_row_ids = gather_rows(row_ids, group, row_sizes)
    return _occurrences(row_ids, column_ids).to(precise), _occurrences(column_ids, all_row_ids).to(precise)


def _places(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids as int32 of the same meaning: the place of the first column with an id; a place of its own behind all columns where
    no column has it. Ids < 0 become -1. Does not wait for the device.

    Where texts lie in the order of their images, a block of logits away from the diagonal then shows by the least and greatest
    id of its rows and columns that it holds no positive.
    """
    count = len(column_ids)
    ordered, order = column_ids.sort(stable=True)
    columns = order[torch.searchsorted(ordered, column_ids)] if count else order
    rows = torch.arange(count, count + len(row_ids), device=row_ids.device)
    if count:
        found = torch.searchsorted(ordered, row_ids).clamp(max=count - 1)
        rows = torch.where(ordered[found] == row_ids, order[found], rows)
    return tuple(torch.where(ids < 0, -1, place).int() for ids, place in ((row_ids, rows), (column_ids, columns)))  # type: ignore[return-value]


def _occurrences(wanted: Tensor, among: Tensor) -> Tensor:
    """How often each id of `wanted` [n] occurs in `among` [m] -> [n]; 0 for an id < 0. Does not wait for the device."""
    ordered = among.sort().values
    count = torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
    return torch.where(wanted >= 0, count, 0)


def _columns(pairs: Pairs, place: Tensor | slice) -> Pairs:
    """The pairs of the columns at `place`. The place after the last column is padding and belongs to no pair."""

    def pick(values: Tensor, padding: int) -> Tensor:
        return torch.cat([values, values.new_full((1,), padding)])[place]

    exclude = pairs.exclude
    if isinstance(place, slice):
        exclude = None if exclude is None else exclude[:, place]
    elif exclude is not None:
        one = exclude[:1] if exclude.stride(0) == 0 else exclude  # a broadcast row stays one row in memory
        exclude = one[:, place.clamp(max=exclude.shape[1] - 1)].expand(len(exclude), -1) if exclude.shape[1] else None
    return replace(
        pairs, column_ids=pick(pairs.column_ids, -1), column_mean=pick(pairs.column_mean, 0),
        column_share=pick(pairs.column_share, 0), exclude=exclude,
    )  # fmt: skip


def _taking_part(features: Tensor, ids: Tensor) -> Tensor:
    """Features with 0 in the rows that are left out: their values must not reach a matrix product."""
    return features.masked_fill((ids < 0)[:, None], 0)


def _poison(image: Tensor, text: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN if any feature is not finite, else 0. Without this, a row whose logits are all -inf would vanish from the sums."""
    # The extremes need no copy of the features, as `isfinite` would; 0 times infinity is NaN.
    extremes = [extreme for features in (image, text) if features.numel() for extreme in features.aminmax()]
    return sum((0 * extreme.to(dtype) for extreme in extremes), image.new_zeros((), dtype=dtype))


def _log_sum(peak: Tensor, total: Tensor) -> Tensor:
    """peak + log(total) -> [2, n]: the rounded sum, and its rounding error.

    Without the error term, float32 gradients at a scale of 100 would be three times less exact than open_clip's.
    """
    log = total.log()
    whole = peak + log
    part = whole - peak
    rest = (peak - (whole - part)) + (log - part)  # exact, by Knuth's two-sum
    return torch.stack([whole, torch.where(whole.isfinite(), rest, 0)])


def _dot(weight: Tensor, sums: Tensor) -> Tensor:
    """Weighted sum of `_log_sum`s [2, n], in float64. Weight 0 also drops infinite ones (rows without any pair)."""
    return torch.where(weight > 0, weight.double() * sums.double().sum(0), 0).sum()


# -- Autograd: a custom operator for one process, an autograd function around the collectives for several --------------------


@torch.library.custom_op("mmclip::contrastive_loss", mutates_args=())
def contrastive_op(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(
        image, text, scale, bias, image_ids, text_ids, row_weight, col_weight, exclude, diagonal,
        cast(Mode, mode), cast(Impl, impl), None, [len(image)], [len(text)],
    )  # fmt: skip


@contrastive_op.register_fake
def _(image: Tensor, text: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(torch.float32, image.dtype)
    return tuple(image.new_empty(size, dtype=precise) for size in (2, (2, len(image)), (2, len(text))))  # type: ignore[return-value]


@torch.library.custom_op("mmclip::contrastive_loss_backward", mutates_args=())
def contrastive_backward_op(
    upstream: Tensor, losses: Tensor, row_lse: Tensor, column_lse: Tensor,
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        upstream, losses, row_lse, column_lse, image, text, scale, bias, image_ids, text_ids,
        row_weight, col_weight, exclude, diagonal, cast(Mode, mode), cast(Impl, impl), None, [len(image)], [len(text)],
    )  # fmt: skip


@contrastive_backward_op.register_fake
def _(
    upstream: Tensor, losses: Tensor, row_lse: Tensor, column_lse: Tensor,
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(value.new_empty(value.shape) for value in (image, text, scale, bias))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.options = inputs[9:12]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *contrastive_backward_op(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 8


contrastive_op.register_autograd(_differentiate, setup_context=_save)


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = _forward(*arguments)
        ctx.save_for_backward(*output, *arguments[:9])
        ctx.options = arguments[9:]
        return output[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(upstream[0], *(*ctx.saved_tensors, *ctx.options))
        return *gradients, *[None] * 11
