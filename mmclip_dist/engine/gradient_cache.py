"""A step whose contrastive batch is exact, whatever fits into memory at once: gradient caching (Gao et al., arXiv 2101.06983).

The first pass embeds the batch part by part and keeps no activation. The contrastive loss of the whole global batch then gives
the gradient of each embedding. The second pass runs each part again and sends its gradient on into the encoders, together
with the part's share of the other losses. Random states are replayed, so that both passes see the same dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmclip_dist.config import Loss
from mmclip_dist.engine.finite import poisoned
from mmclip_dist.engine.random_state import random_state, set_random_state
from mmclip_dist.model.classifier import Weights
from mmclip_dist.model.inputs import PlannedBatch, parts_of
from mmclip_dist.model.mmclip import MMCLIP, Embedded, Part


def forward_backward(engine: Any, batch: PlannedBatch, weights: Loss | Weights) -> dict[str, Tensor]:
    """Losses of this rank's batch, and their gradients in the engine, ready for `engine.step()`. A collective call.

    The batch's plan says in how many passes it is computed.
    """
    parts = parts_of(batch)
    if len(parts) == 1:
        losses: dict[str, Tensor] = engine(batch)
        engine.backward(poisoned(weighted_sum(losses, weights)))
        return losses
    batch = engine.module.prepared(batch)
    for part in parts:
        part["counts"] = batch["counts"]
    states, embedded = [], []
    if weights.contrastive:
        for part in parts:
            states.append(random_state())
            with torch.no_grad():
                embedded.append(engine(part, embed_only=True))
    contrastive, gradients = _contrast(engine.module, embedded, batch) if embedded else (None, [None] * len(parts))

    shares: list[dict[str, Tensor]] = []
    for index, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
        engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
        if states:
            set_random_state(states[index])  # the gradient belongs to the embeddings of the first pass
        losses = engine(part, Part(len(parts), gradient))
        engine.backward(poisoned(weighted_sum(losses, weights)), scale_wrt_gas=False)
        shares.append({name: value.detach() for name, value in losses.items()})
    totals = {name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]}
    return totals if contrastive is None else totals | {"contrastive": contrastive}


def weighted_sum(losses: dict[str, Tensor], weights: Loss | Weights) -> Tensor:
    return torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()


def _contrast(model: MMCLIP, embedded: list[Embedded], batch: PlannedBatch) -> tuple[Tensor, list[Embedded]]:
    """The contrastive loss of the whole batch, and its gradient in what each part embedded."""
    first = embedded[0]
    whole = Embedded(
        torch.cat([part.image for part in embedded]).requires_grad_(),
        torch.cat([part.report for part in embedded]).requires_grad_(),
        first.prompt.detach().requires_grad_(),
        first.scale.detach().requires_grad_(),
    )
    loss = model.contrast(whole, batch)
    leaves = [whole.image, whole.report, whole.prompt, whole.scale]
    image, report, prompt, scale = torch.autograd.grad(loss, leaves, materialize_grads=True)
    sizes = [len(part.image) for part in embedded], [len(part.report) for part in embedded]
    pairs = zip(image.split(sizes[0]), report.split(sizes[1]), strict=True)
    return loss.detach(), [Embedded(of_image, of_report, prompt, scale) for of_image, of_report in pairs]
