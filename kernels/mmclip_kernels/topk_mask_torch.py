"""impl="torch": attention-guided masking on any device. Rows are copied by flat indices: one int64 a row, not one an element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmclip_kernels.patches import Plan


def forward(
    patches: Tensor, token: Tensor | None, features: Tensor | None, text: Tensor | None, token_mask: Tensor | None,
    scores: Tensor | None, noise: Tensor | None, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `topk_mask_op`."""
    precise = torch.promote_types(torch.float32, patches.dtype)
    if text is None:
        assert scores is not None
        found = ranked = scores.to(precise, copy=True)
    else:
        found = ranked = patch_scores(patches if features is None else features, text, token_mask, plan.temperature)
        if token_mask is not None:
            assert noise is not None
            ranked = torch.where(token_mask.any(1, keepdim=True), found, noise.to(precise))
    restore, ids = places(ranked, noise, plan)
    if token is None:
        views = [_rows(patches, ids[:, : plan.first]), _rows(patches, ids[:, plan.first :])]
    else:
        views = [torch.where((restore < plan.first)[:, :, None], patches, token), patches.new_empty(len(patches), 0, len(token))]
    wrong = found.isnan().any(1)
    if found.device.type != "cpu" or bool(wrong.any()):  # reading this spares a CPU a copy, and would make it wait for a card
        views = [view.masked_fill(wrong[:, None, None], torch.nan) for view in views]
    return *views, restore, ids, found  # type: ignore[return-value]


def backward(
    of_first: Tensor, of_second: Tensor, restore: Tensor, first: int, second: int, replace: bool
) -> tuple[Tensor, Tensor]:
    """See `topk_mask_backward_op`."""
    hidden = (restore >= first + second)[:, :, None]
    if replace:
        # A matrix product as the sum: it copies nothing and is 30 times as fast on a CPU (kernels/bench/NOTES.md).
        of_token = hidden.flatten().to(of_first.dtype) @ of_first.flatten(0, 1)
        return torch.where(hidden, 0.0, of_first), of_token
    of_token = of_first.new_zeros(of_first.shape[2])
    if first + second == 0:
        return of_first.new_zeros(*restore.shape, of_first.shape[2]), of_token
    both = torch.cat([of_first, of_second], 1) if second else of_first
    return _spread(both, restore), of_token


def patch_scores(features: Tensor, text: Tensor, token_mask: Tensor | None, temperature: float) -> Tensor:
    """Scores [B, P] of features [B, P, E] against text [B, E] or [B, T, E], in float32 or float64."""
    precise = torch.promote_types(torch.float32, features.dtype)
    patches, words = (F.normalize(x.to(precise), dim=-1) for x in (features, text))
    if text.ndim == 2:
        return torch.einsum("bpe,be->bp", patches, words)
    response = (words @ patches.transpose(1, 2)).div_(temperature).softmax(dim=2)
    return (response if token_mask is None else response.masked_fill_(~token_mask[:, :, None], 0)).sum(1)


def places(ranked: Tensor, noise: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """ranked [B, P]: patches are ranked by it -> ids_restore [B, P], ids of both views [B, first + second]."""
    chosen = _front(ranked.argsort(dim=1, descending=not plan.low, stable=True), plan.chosen)
    if plan.swap:
        assert noise is not None
        leave = _lowest(noise.masked_fill(~chosen, torch.inf), plan.swap)
        enter = _lowest(noise.masked_fill(chosen, torch.inf), plan.swap)
        chosen = chosen ^ leave ^ enter
    first = chosen if plan.chosen_first else ~chosen
    second = torch.zeros_like(first)
    if plan.second == ranked.shape[1] - plan.first:
        second = ~first
    elif plan.second:
        assert noise is not None
        second = _lowest(noise.masked_fill(first, torch.inf), plan.second)
    rest = ~(first | second)
    restore = torch.where(first, first.cumsum(1), 0) + torch.where(second, second.cumsum(1) + plan.first, 0)
    restore += torch.where(rest, rest.cumsum(1) + (plan.first + plan.second), 0) - 1
    index = torch.arange(ranked.shape[1], device=ranked.device).expand_as(restore)
    ids = torch.empty_like(restore).scatter_(1, restore, index)[:, : plan.first + plan.second]
    return restore, ids.contiguous()


def _lowest(values: Tensor, count: int) -> Tensor:
    """[B, P] -> [B, P] bool: True at the `count` lowest values of each row; of equal values, at the first ones."""
    return _front(values.argsort(dim=1, stable=True), count)


def _front(order: Tensor, count: int) -> Tensor:
    """order [B, P] of indices -> [B, P] bool: True at the first `count` of these indices."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)


def _spread(values: Tensor, places: Tensor) -> Tensor:
    """values [B, K, D], at each of places [B, P] -> [B, P, D]; 0 where the place is K or more."""
    # Bags of one row or none: each row is written once. To gather all and fill the hidden takes 1.6 times as long on a CPU.
    rows, kept, _ = values.shape
    seen = places.flatten() < kept
    starts = seen.cumsum(0) - seen.long()
    start = torch.arange(rows, device=places.device)[:, None] * kept
    order = places.new_empty(rows * kept + 1).scatter_(0, starts.where(seen, rows * kept), (places + start).flatten())
    return F.embedding_bag(order[:-1], values.flatten(0, 1), starts, mode="sum").unflatten(0, places.shape)


def _rows(values: Tensor, ids: Tensor) -> Tensor:
    """values [B, P, D] at ids [B, K] -> [B, K, D]."""
    start = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (ids + start).flatten()).unflatten(0, ids.shape)
