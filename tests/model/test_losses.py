"""The losses as pure functions, against loops over single images and prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmclip_dist.model.losses import masked_cross_entropy, masked_mean_square, prompt_contrastive, prompt_targets


def naive_prompt_loss(image: Tensor, prompt: Tensor, scale: float, labels: list[list[int]]) -> float:
    """Row by row, then column by column: cross-entropy to the evenly shared positives, over known diseases alone."""
    diseases = len(labels[0])

    def direction(pairs: list[tuple[list[float], list[bool]]]) -> float:
        """Mean over the rows with a positive; each row holds its allowed logits, and which of them are positives."""
        rows = []
        for logits, positives in pairs:
            if any(positives):
                logs = torch.log_softmax(torch.tensor(logits), 0)
                rows.append(-sum(float(log) for log, yes in zip(logs, positives, strict=True) if yes) / sum(positives))
        return sum(rows) / len(rows)

    def is_positive(row: int, column: int) -> bool:
        return labels[row][column % diseases] == (1 if column < diseases else 0)

    def logit(row: int, column: int) -> float:
        return scale * float(image[row] @ prompt[column])

    def known(row: int, column: int) -> bool:
        return labels[row][column % diseases] >= 0

    rows, columns = range(len(labels)), range(2 * diseases)
    by_image = [
        ([logit(r, c) for c in columns if known(r, c)], [is_positive(r, c) for c in columns if known(r, c)]) for r in rows
    ]
    by_prompt = [
        ([logit(r, c) for r in rows if known(r, c)], [is_positive(r, c) for r in rows if known(r, c)]) for c in columns
    ]
    return (direction(by_image) + direction(by_prompt)) / 2


def test_prompt_contrastive_equals_a_loop_over_images_and_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [[1, 0, -1], [1, 1, 0], [-1, -1, -1], [0, 0, 0], [0, -1, 1]]
    image, prompt = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (5, 6))
    loss, rows = prompt_contrastive(image, prompt, torch.tensor([7.0]), torch.tensor(labels), None)
    assert float(loss) == pytest.approx(naive_prompt_loss(image, prompt, 7.0, labels), rel=1e-5)
    assert int(rows) == 4  # the third image has no known disease


def test_prompt_targets_leave_unknown_labels_out() -> None:
    positive, allowed = prompt_targets(torch.tensor([[1, 0, -1]]))
    assert positive.tolist() == [[True, False, False, False, True, False]]
    assert allowed.tolist() == [[True, True, False, True, True, False]]
    image, prompt = torch.eye(8)[:1], torch.eye(8)[:6]
    loss, rows = prompt_contrastive(image, prompt, torch.ones(1), torch.tensor([[1, 0, -1]]), None)
    other = prompt.clone()
    other[2] = other[5] = 7.0  # the unknown disease's prompts
    changed, _ = prompt_contrastive(image, other, torch.ones(1), torch.tensor([[1, 0, -1]]), None)
    assert loss == changed and rows == 1


def test_masked_losses_are_means_over_what_is_masked() -> None:
    predicted, target = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    target[0, 1] = 3
    masked = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean_square(predicted, target, masked) == 5
    logits = torch.zeros(4, 10)
    assert masked_cross_entropy(logits, torch.arange(4), torch.tensor(4)).item() == pytest.approx(2.302585)
    assert masked_cross_entropy(logits[:0], torch.arange(0), torch.tensor(0)) == 0
