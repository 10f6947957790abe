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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mmclip_kernels.implementation import Impl, implementation
from mmclip_kernels.pairs import LogSums, Mode, Pairs, Slopes, Weights, finite
from mmclip_kernels.ranks import Group, Shards, all_reduce, rank_sizes

Power = Callable[[Tensor], Tensor]
# Losses [2], 1 / sums of weights [2], log-sum-exps [N + M], and the parts of `Weights`.
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    features give NaN, and so does a scale or bias that is not finite. ValueError for arguments that do not fit. Weights are
    passed on all ranks or on none.
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
) -> Saved:  # fmt: skip
    """-> losses [2] of rows and columns, and what the backward pass needs. Columns: those of all ranks, as `Shards` has them."""
    kernels, vectors = (implementation(name, impl, image.device) for name in ("contrastive", "weights"))
    if not diagonal:
        image, text = _taking_part(image, image_ids), _taking_part(text, text_ids)
    precise = torch.promote_types(torch.float32, image.dtype)  # float64 stays float64: gradcheck needs it
    shards = Shards(column_sizes, group)
    column_ids, all_row_ids, counts = shards.spread(text_ids, -1), None, None
    if exclude is not None:
        counts = _positives(image_ids, column_ids, exclude, shards)
    elif diagonal:
        counts = image_ids >= 0, column_ids >= 0
    else:
        all_row_ids = Shards(row_sizes, group).spread(image_ids, -1)
    column_weight = None if col_weight is None else shards.spread(col_weight.to(precise), 0)
    weights: Weights = vectors.relate(image_ids, column_ids, all_row_ids, counts, row_weight, column_weight, mode, precise)
    kept = image.new_empty(_kept_size(image, text, impl, group), dtype=precise)
    pairs = replace(_pairs(scale, bias, exclude, diagonal, shards, precise, len(image), *weights[:3]), kept=kept)
    parts = [
        kernels.sweep(image, texts, _piece(pairs, shards, number), mode) for number, texts in enumerate(shards.gather(text))
    ]  # fmt: skip
    # float64, because the loss is a small difference of two large means: of the log-sum-exps and of the positives' logits.
    total = reduce(torch.add, [part.total for part in parts]) + _poison(image, text, pairs.factor, pairs.bias)
    sums = weights.sums
    if mode == "softmax":
        rows = _together([part.rows for part in parts], vectors.power)
        columns = _over_ranks([part.columns for part in parts], vectors.power, group)
        lse, means = vectors.log_sums(rows, columns, weights.mean)
        if group is not None and dist.get_rank(group) > 0:  # every rank has summed all columns: the first one's sum counts
            means[1], sums[1] = 0, 0
        total = total + means
    if group is not None:
        total, sums = all_reduce(torch.stack([total, sums]), group)
    if mode == "sigmoid":
        lse, sums = total.new_zeros(len(weights.mean)), sums[:1].expand(2)
    normalizer = sums.reciprocal().nan_to_num(nan=torch.nan, posinf=0)  # without a positive, the loss is 0
    return (total * normalizer).to(precise), normalizer, lse, *weights, kept


def _backward(
    upstream: Tensor, losses: Tensor, normalizer: Tensor, lse: Tensor,
    place: Tensor, mean: Tensor, share: Tensor, sums: Tensor, largest: Tensor, kept: Tensor,
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: Mode, impl: Impl,
    group: Group, row_sizes: Sequence[int], column_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """upstream [2] -> gradients of image, text, scale and bias. Computes most logits again."""
    kernels, vectors = (implementation(name, impl, image.device) for name in ("contrastive", "weights"))
    types = image.dtype, text.dtype
    if not diagonal:
        image, text = _taking_part(image, image_ids), _taking_part(text, text_ids)
    precise, count = losses.dtype, len(image)
    if group is not None:  # the engine averages over the ranks
        upstream = upstream * dist.get_world_size(group)
    weights = Weights(place, mean, share, sums, largest)
    slopes: Slopes = vectors.slopes(upstream, losses, normalizer, scale.detach().to(precise), lse, weights, count, mode)
    shards = Shards(column_sizes, group)
    pairs = replace(
        _pairs(scale, bias, exclude, diagonal, shards, precise, count, place, slopes.mean, slopes.share), unit=slopes.unit,
        kept=kept,
    )  # fmt: skip
    row_lse, column_lse = slopes.lse[:count], slopes.lse[count:]
    image_grads: list[Tensor] = []
    scalar_grads: list[tuple[Tensor, Tensor]] = []

    def text_gradients() -> Iterator[Tensor]:
        for number, texts in enumerate(shards.gather(text)):
            lse = column_lse[shards.columns[number]]
            of_image, of_text, *of_scalars = kernels.gradient(
                image, texts, _piece(pairs, shards, number), mode, row_lse, lse
            )  # fmt: skip
            image_grads[:] = [image_grads[0].add_(of_image) if image_grads else of_image]
            scalar_grads.append(tuple(of_scalars))
            yield of_text

    text_grad = shards.reduce(text_gradients())
    factor_grad, bias_grad = (reduce(torch.add, parts) for parts in zip(*scalar_grads, strict=True))
    return (
        image_grads[0].to(types[0]), text_grad.to(types[1]),
        factor_grad.reshape(scale.shape).to(scale.dtype),
        bias_grad.reshape(bias.shape).to(bias.dtype, copy=True),  # the outputs of an operator must not share memory
    )  # fmt: skip


def _kept_size(image: Tensor, text: Tensor, impl: str, group: Group) -> int:
    """Cosines that are kept for the backward pass: in one process only, as the pieces of several ranks would share the room."""
    if group is not None:
        return 0
    size: int = implementation("contrastive", impl, image.device).kept_size(len(image), len(text), image.device)
    return size


def _pairs(
    scale: Tensor, bias: Tensor, exclude: Tensor | None, diagonal: bool, shards: Shards, precise: torch.dtype,
    rows: int, place: Tensor, mean: Tensor, share: Tensor,
) -> Pairs:  # fmt: skip
    """The pairs of this rank's rows and all ranks' columns, whose vectors lie end to end."""
    return Pairs(
        row_ids=place[:rows], column_ids=place[rows:], some_out=not diagonal or shards.padded, exclude=exclude,
        factor=scale.detach().reshape(()).to(precise), bias=bias.detach().reshape(()).to(precise),
        row_mean=mean[:rows], column_mean=mean[rows:], row_share=share[:rows], column_share=share[rows:],
    )  # fmt: skip


def _piece(pairs: Pairs, shards: Shards, number: int) -> Pairs:
    """The pairs of one piece's columns."""
    place = shards.columns[number]
    return replace(
        pairs, column_ids=pairs.column_ids[place], column_mean=pairs.column_mean[place],
        column_share=pairs.column_share[place], exclude=_excluded(pairs.exclude, shards, number),
    )  # fmt: skip


def _excluded(exclude: Tensor | None, shards: Shards, number: int) -> Tensor | None:
    """The columns of one piece, of exclusions whose columns are in rank order. Those of padding hold anything."""
    if exclude is None or shards.group is None:
        return exclude
    if not exclude.shape[1]:
        return None
    one = exclude[:1] if exclude.stride(0) == 0 else exclude  # a broadcast row stays one row in memory
    return one[:, shards.places(number, exclude.device).clamp(max=exclude.shape[1] - 1)].expand(len(exclude), -1)


def _positives(row_ids: Tensor, column_ids: Tensor, exclude: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """-> how many positives each of this rank's rows has among all columns, and each column among all rows."""
    of_rows, of_columns = torch.zeros_like(row_ids), torch.zeros_like(column_ids)
    for number, place in enumerate(shards.columns):
        ids, excluded = column_ids[place], _excluded(exclude, shards, number)
        if excluded is None:  # there is no column
            continue
        step = max(1, (1 << 24) // max(len(ids), 1))  # at most 16 MiB of pairs at once
        for start in range(0, len(row_ids), step):
            here = slice(start, start + step)
            positive = (row_ids[here, None] == ids) & (ids >= 0) & ~excluded[here]
            of_rows[here] += positive.sum(1)
            of_columns[place] += positive.sum(0)
    return of_rows, all_reduce(of_columns, shards.group)


def _together(parts: list[LogSums], power: Power) -> LogSums:
    """The log-sum-exps of the same rows over the columns of several pieces."""
    if len(parts) == 1:
        return parts[0]
    peak, total = (torch.stack(values) for values in zip(*((part.peak, part.total) for part in parts), strict=True))
    highest = peak.amax(0)
    return LogSums(highest, (total * power(peak - finite(highest))).sum(0))


def _over_ranks(parts: list[LogSums], power: Power, group: Group) -> LogSums:
    """The log-sum-exps of all pieces' columns over the rows of all ranks."""
    if group is None:
        return parts[0]
    peak = torch.cat([part.peak for part in parts])
    highest = all_reduce(peak, group, dist.ReduceOp.MAX)
    total = torch.cat([part.total for part in parts]) * power(peak - finite(highest))
    return LogSums(highest, all_reduce(total, group))


def _taking_part(features: Tensor, ids: Tensor) -> Tensor:
    """Features with 0 in the rows that are left out: their values must not reach a matrix product."""
    return features.masked_fill((ids < 0)[:, None], 0)


def _poison(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """NaN if any of these is not finite, else 0. Without this, a row whose logits are all -inf would vanish from the sums."""
    # The extremes need no copy of the features, as `isfinite` would; 0 times infinity is NaN.
    extremes = [extreme for features in (image, text) if features.numel() for extreme in features.aminmax()]
    return 0 * torch.cat([value.reshape(1) for value in (*extremes, factor, bias)]).sum()


# -- Autograd: a custom operator for one process, an autograd function around the collectives for several --------------------


@torch.library.custom_op("mmclip::contrastive_loss", mutates_args=())
def contrastive_op(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(
        image, text, scale, bias, image_ids, text_ids, row_weight, col_weight, exclude, diagonal,
        cast(Mode, mode), cast(Impl, impl), None, [len(image)], [len(text)],
    )  # fmt: skip


@contrastive_op.register_fake
def _(image: Tensor, text: Tensor, *others: Any) -> Saved:
    precise = torch.promote_types(torch.float32, image.dtype)
    both, exact = len(image) + len(text), torch.float64
    weights = (both, torch.int32), (both, precise), (both, precise), (2, exact), (2, exact)
    made = ((2, precise), (2, exact), (both, exact), *weights, (_kept_size(image, text, others[-1], None), precise))
    return tuple(image.new_empty(size, dtype=dtype) for size, dtype in made)  # type: ignore[return-value]


@torch.library.custom_op("mmclip::contrastive_loss_backward", mutates_args=())
def contrastive_backward_op(
    upstream: Tensor, losses: Tensor, normalizer: Tensor, lse: Tensor,
    place: Tensor, mean: Tensor, share: Tensor, sums: Tensor, largest: Tensor, kept: Tensor,
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor,
    row_weight: Tensor | None, col_weight: Tensor | None, exclude: Tensor | None, diagonal: bool, mode: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        upstream, losses, normalizer, lse, place, mean, share, sums, largest, kept,
        image, text, scale, bias, image_ids, text_ids,
        row_weight, col_weight, exclude, diagonal, cast(Mode, mode), cast(Impl, impl), None, [len(image)], [len(text)],
    )  # fmt: skip


@contrastive_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(value.new_empty(value.shape) for value in arguments[10:14])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.options = inputs[9:12]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros in place of the gradient of what is kept


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:  # nothing depends on the losses
        return (None,) * 12
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
