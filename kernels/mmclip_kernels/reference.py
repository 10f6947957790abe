"""The specification of the kernels, in plain PyTorch and any floating type up to float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    mode: str = "softmax",
    directions: bool = False,
) -> Tensor:
    """Computed from the whole N x M matrix. Arguments and result as in `mmclip_kernels.contrastive_loss`."""
    if image_ids is None or text_ids is None:
        image_ids, text_ids = torch.arange(len(image)), torch.arange(len(text))
    rows, columns = image_ids >= 0, text_ids >= 0
    out = torch.zeros(len(image), len(text), dtype=torch.bool) if exclude is None else exclude.expand(len(image), -1)
    out = out.expand(-1, len(text))[rows][:, columns]
    u = torch.ones(len(image)) if row_weight is None else row_weight
    v = torch.ones(len(text)) if col_weight is None else col_weight
    u, v = u[rows].to(image.dtype), v[columns].to(image.dtype)
    logits = scale * image[rows] @ text[columns].T
    positive = (image_ids[rows][:, None] == text_ids[columns]) & ~out
    if mode == "sigmoid":
        cost = -F.logsigmoid(torch.where(positive, 1, -1) * (logits if bias is None else logits + bias))
        return (u[:, None] * v * cost).masked_fill(out, 0).sum() / (u.sum() if u.sum() > 0 else 1)
    halves = _one_direction(logits, positive, out, u), _one_direction(logits.T, positive.T, out.T, v)
    return torch.stack(halves) if directions else sum(halves, torch.zeros(())) / 2


def _one_direction(logits: Tensor, positive: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    """[N, M] -> []. Weighted mean of the cross-entropy over the rows with a positive. A row's positives share its target."""
    matched = positive.sum(1) > 0
    if not (weight * matched).sum() > 0:
        return logits.sum() * 0.0
    logits, positive, out, weight = logits[matched], positive[matched], out[matched], weight[matched]
    target = positive.to(logits.dtype) / positive.sum(1, keepdim=True)
    loss = logits.masked_fill(out, -torch.inf).logsumexp(1) - (target * logits).sum(1)
    return (weight * loss).sum() / weight.sum()


def patch_scores(features: Tensor, text: Tensor, token_mask: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """Scores of the patches: features [B, P, E], text [B, E] or [B, T, E], token_mask [B, T] (True: the word counts) -> [B, P].

    s_j = sum over the words i that count of softmax over j of (<w_i, p_j> / temperature), with L2-normalised w and p. For one
    text vector the score is the cosine, which gives the same ranking.
    """
    patches, words = F.normalize(features, dim=-1), F.normalize(text, dim=-1)
    if text.ndim == 2:
        return (patches @ words[:, :, None])[:, :, 0]
    response = torch.softmax(torch.einsum("bte,bpe->btp", words, patches) / temperature, dim=2)
    return response.sum(1) if token_mask is None else torch.where(token_mask[:, :, None], response, 0).sum(1)


def hidden_patches(scores: Tensor, count: int, select: str = "high", swap: int = 0, noise: Tensor | None = None) -> Tensor:
    """Which `count` patches are hidden: scores [B, P] -> [B, P] bool, one row at a time.

    swap: this many hidden patches, those of lowest noise, become visible; as many visible ones of lowest noise become hidden.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(len(scores)):
        order = torch.sort(scores[row], descending=select != "low", stable=True).indices.tolist()
        hidden, visible = order[:count], order[count:]
        if swap and noise is not None:
            leave, enter = (sorted(some, key=lambda j: (noise[row, j].item(), j))[:swap] for some in (hidden, visible))
            hidden = [j for j in hidden if j not in leave] + enter
        mask[row, hidden] = True
    return mask


def keep_visible(patches: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> the `keep` patches [B, K, D] that mask [B, P] leaves visible, ids_keep [B, K], ids_restore [B, P].

    As in MAE: a stable sort moves the visible patches to the front, and a second sort inverts the first.
    """
    shuffle = mask.long().argsort(dim=1, stable=True)
    kept = shuffle[:, :keep]
    return patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2])), kept, shuffle.argsort(dim=1)


def replace_hidden(patches: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """patches [B, P, D], where token [D] replaces those that mask [B, P] hides."""
    return torch.where(mask[:, :, None], token, patches)
