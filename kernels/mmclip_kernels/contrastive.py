"""The contrastive loss over the global batch, every logit computed once across all ranks.

With s_ij = scale <image_i, text_j>, P_ij = 1 where image i and text j share a group id, n_i = sum_j P_ij and
m_j = sum_i P_ij:

    L = 1/2 [ mean_i (lse_j s_ij - sum_j P_ij s_ij / n_i)  +  mean_j (lse_i s_ij - sum_i P_ij s_ij / m_j) ]

over the rows i with n_i > 0 and the columns j with m_j > 0. A rank owns its image rows: it computes them against all
texts in chunks, keeps the log-sum-exps alone, and shares the columns' (maximum, sum) partials. The backward pass forms
G = dL/ds chunk by chunk again; dText partials are summed over ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    chunk: int = 4096,
    impl: Literal["torch"] = "torch",
    group: Group = None,
) -> Tensor:
    """Symmetric multi-positive InfoNCE of image [N, E] and text [M, E] (L2-normalised by the caller) -> scalar, float32.

    scale: the factor on the cosine, not its logarithm; shape [] or [1].
    image_ids [N], text_ids [M]: int64 group ids; an image and a text are positives when they share one, and a row with
      an id < 0 takes no part, not even as a negative. Both None: the diagonal (N = M).
    chunk: image rows whose logits are in memory at once; memory is chunk x (texts of all ranks) x 4 bytes.
    group: the ranks whose rows form one batch (N and M may differ between them); None: this process alone. With a
      group, ids are global: None stands for the diagonal of each rank. Every rank returns the global loss. The
      gradients are scaled so that *averaging* parameter gradients over the ranks, as data-parallel engines do, gives
      exactly the gradient of the global loss; the scale's gradient included.

    Raises ValueError for widths, ids or an `impl` that do not fit.
    """
    if impl != "torch":
        raise ValueError(f"impl={impl!r} is not available; use impl='torch'")
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"image [N, E] and text [M, E] must share E, found {list(image.shape)}, {list(text.shape)}")
    if scale.numel() != 1:
        raise ValueError(f"scale must hold one number, found shape {list(scale.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, found {chunk}")
    if image_ids is None or text_ids is None:
        if image_ids is not text_ids or len(image) != len(text):
            raise ValueError("pass both image_ids and text_ids, or neither with as many images as texts")
        rank = dist.get_rank(group) if group is not None else 0
        image_ids = text_ids = torch.arange(len(image), device=image.device) + (rank << 40)
    if image_ids.shape != image.shape[:1] or text_ids.shape != text.shape[:1]:
        raise ValueError(
            f"one id a row: {len(image)} images and {len(text)} texts, "
            f"but ids of shape {list(image_ids.shape)} and {list(text_ids.shape)}"
        )
    taking_part = image_ids >= 0, text_ids >= 0
    image, image_ids = image[taking_part[0]], image_ids[taking_part[0]]
    text, text_ids = text[taking_part[1]], text_ids[taking_part[1]]
    loss: Tensor = _ContrastiveLoss.apply(image, text, scale, image_ids, text_ids, chunk, group)
    return loss


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        chunk: int,
        group: Group,
    ) -> Tensor:
        texts, ctx.text_sizes = gather_rows(text, group)
        all_image_ids, all_text_ids = gather_rows(image_ids, group)[0], gather_rows(text_ids, group)[0]
        precise = torch.promote_types(torch.float32, image.dtype)  # float64 stays float64, for gradcheck
        factor = scale.detach().reshape(()).to(precise)

        # Weight of one positive pair in the row term and in the column term; 0 where there is no positive.
        rows_matched, row_weight = _positive_weights(all_image_ids, all_text_ids, image_ids)
        columns_matched, column_weight = _positive_weights(all_text_ids, all_image_ids, all_text_ids)
        row_weight, column_weight = row_weight.to(precise), column_weight.to(precise)

        row_lse = torch.zeros(len(image), dtype=precise, device=image.device)
        column_max = torch.full((len(texts),), -torch.inf, dtype=precise, device=image.device)
        column_sum = torch.zeros_like(column_max)
        attraction = torch.zeros((), dtype=precise, device=image.device)
        for start in range(0, len(image), chunk):
            here = slice(start, start + chunk)
            logits = factor * (image[here].to(precise) @ texts.to(precise).T)
            positive = image_ids[here, None] == all_text_ids[None, :]
            row_lse[here] = logits.logsumexp(1)
            peak = torch.maximum(column_max, logits.amax(0))
            column_sum = column_sum * (column_max - peak).exp() + (logits - peak).exp().sum(0)
            column_max = peak
            attraction += (positive * (row_weight[here, None] + column_weight) * logits).sum()
        column_lse = _merge_columns(column_max, column_sum, group)

        row_used = (row_weight > 0).to(precise) / rows_matched
        column_used = (column_weight > 0).to(precise) / columns_matched
        own = _dot(row_used, row_lse) - attraction
        ctx.save_for_backward(
            image, texts, factor, image_ids, all_text_ids,
            row_lse, column_lse, row_weight, column_weight, row_used, column_used,
        )  # fmt: skip
        ctx.chunk, ctx.group, ctx.scale_like = chunk, group, scale
        return 0.5 * (_all_reduce(own, group) + _dot(column_used, column_lse))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (image, texts, factor, image_ids, all_text_ids,
         row_lse, column_lse, row_weight, column_weight, row_used, column_used) = ctx.saved_tensors  # fmt: skip
        precise = factor.dtype
        image_grad = torch.zeros(image.shape, dtype=precise, device=image.device)
        text_grad = torch.zeros(texts.shape, dtype=precise, device=image.device)
        factor_grad = torch.zeros((), dtype=precise, device=image.device)
        for start in range(0, len(image), ctx.chunk):
            here = slice(start, start + ctx.chunk)
            cosine = image[here].to(precise) @ texts.to(precise).T
            logits = factor * cosine
            positive = image_ids[here, None] == all_text_ids[None, :]
            gradient = (
                (logits - row_lse[here, None]).exp() * row_used[here, None]
                + (logits - column_lse).exp() * column_used
                - positive * (row_weight[here, None] + column_weight)
            )
            image_grad[here] = factor * (gradient @ texts.to(precise))
            text_grad += factor * (gradient.T @ image[here].to(precise))
            factor_grad += (gradient * cosine).sum()
        world = dist.get_world_size(ctx.group) if ctx.group is not None else 1
        own_text_grad = _own_rows(_all_reduce(text_grad, ctx.group), ctx.text_sizes, ctx.group)
        weight = 0.5 * world * upstream[0].to(precise)
        return (
            (weight * image_grad).to(image.dtype),
            (weight * own_text_grad).to(texts.dtype),
            (weight * factor_grad).reshape(ctx.scale_like.shape).to(ctx.scale_like.dtype),
            None, None, None, None,
        )  # fmt: skip


def _positive_weights(ids: Tensor, partner_ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `ids` have a partner (at least 1, a divisor) [], and 1 / (partners x that) for each of `wanted`."""
    groups, counts = partner_ids.unique(return_counts=True)
    if len(groups) == 0:
        return torch.ones((), device=ids.device), torch.zeros(len(wanted), dtype=torch.float64, device=ids.device)

    def partners(of: Tensor) -> Tensor:
        slot = torch.searchsorted(groups, of).clamp(max=len(groups) - 1)
        return torch.where(groups[slot] == of, counts[slot], 0)

    matched = (partners(ids) > 0).sum().clamp(min=1)
    own = partners(wanted).double()
    return matched, torch.where(own > 0, 1.0 / (own * matched).clamp(min=1), 0.0)


def _dot(weight: Tensor, value: Tensor) -> Tensor:
    """Weighted sum in which weight 0 silences even an infinite value (a batch without texts)."""
    return torch.where(weight > 0, weight * value, 0.0).sum()


def _merge_columns(peak: Tensor, total: Tensor, group: Group) -> Tensor:
    """Log-sum-exp of each column from every rank's (maximum, sum of exp(s - maximum)). [M], [M] -> [M]."""
    if group is None:
        return peak + total.log()
    highest = peak.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    return highest + _all_reduce(total * (peak - highest).exp(), group).log()


def _all_reduce(value: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of the group, as a new tensor."""
    value = value.clone()
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def gather_rows(rows: Tensor, group: Group) -> tuple[Tensor, list[int]]:
    """Rows [n, ...] of all ranks, in rank order, and each rank's n; ranks may hold different numbers. No gradient."""
    rows = rows.detach()
    if group is None:
        return rows, [len(rows)]
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device), group)
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), counts


def _own_rows(rows: Tensor, sizes: list[int], group: Group) -> Tensor:
    """This rank's part of rows gathered by `gather_rows`."""
    rank = dist.get_rank(group) if group is not None else 0
    return rows[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        gathered, ctx.sizes = gather_rows(rows, group)
        ctx.group = group
        return gathered

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _own_rows(_all_reduce(upstream[0], ctx.group), ctx.sizes, ctx.group), None


def gather_with_gradient(rows: Tensor, group: Group) -> Tensor:
    """Like `gather_rows`; the backward pass sums the gradients that all ranks hold for a row."""
    gathered: Tensor = _GatherWithGradient.apply(rows, group)
    return gathered
