"""The three terms of the objective as pure functions of features. The contrastive one over reports is a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmclip_kernels import gather_with_gradient
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F


def prompt_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which disease prompts an image is paired with, and which it may be compared to.

    labels [B, C]: 1 present, 0 absent, -1 unknown. The 2C prompts are the C positive ones ("There is ..."), then the C
    negative ones ("No evidence of ..."). -> positive [B, 2C], allowed [B, 2C], bool: a disease that is uncertain or not
    mentioned is neither positive nor negative and leaves the denominator.
    """
    positive = torch.cat([labels == 1, labels == 0], dim=1)
    allowed = (labels >= 0).repeat(1, 2)
    return positive, allowed


def prompt_contrastive(
    image: Tensor, prompt: Tensor, scale: Tensor, labels: Tensor, group: ProcessGroup | None,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric multi-positive InfoNCE between unpaired images and disease prompts -> (loss [], images that count []).

    image [N, E] of this rank and prompt [2C, E], both L2-normalised; labels [N, C] as in `prompt_targets`. The batch is that
    of all ranks of `group`. sizes: N of each rank, as in `gather_with_gradient`. Positives of a row share its target mass
    evenly. The matrix has 2C columns only, so it is formed in full.
    """
    image = gather_with_gradient(image, group, sizes)
    positive, allowed = prompt_targets(gather_with_gradient(labels, group, sizes))
    logits = (scale * (image @ prompt.T)).float().masked_fill(~allowed, -torch.inf)
    loss = 0.5 * (_soft_cross_entropy(logits, positive) + _soft_cross_entropy(logits.T, positive.T))
    return loss, positive.any(1).sum()


def _soft_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows with a positive; -inf logits are outside the row's softmax. [R, K] -> []."""
    used = positive.any(1)
    logits = torch.where(used[:, None], logits, 0.0)  # a row that is left out may hold nothing but -inf
    attraction = logits.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    return torch.where(used, logits.logsumexp(1) - attraction, 0.0).sum() / used.sum().clamp(min=1)


def masked_mean_square(predicted: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error of masked patches. [B, P, D], [B, P, D], [B, P] bool -> []."""
    error = (predicted.float() - target).square().mean(2)
    return (error * masked).sum() / masked.sum().clamp(min=1)


def masked_cross_entropy(logits: Tensor, target: Tensor, count: float) -> Tensor:
    """Cross-entropy of masked tokens, summed and divided by `count`. logits [K, vocabulary], target [K] -> [].

    `count` is the mean number of masked tokens of a rank: ranks mask different numbers, and only so does the mean over
    the ranks equal the mean over the global batch.
    """
    return F.cross_entropy(logits.float(), target, reduction="sum") / max(count, 1 / 1024)
