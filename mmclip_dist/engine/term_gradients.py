"""How strongly each term of the objective pulls at the encoders, and whether it pulls the way of the contrastive loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmclip_dist.config import Loss
from mmclip_dist.model.inputs import PlannedBatch
from mmclip_dist.model.mmclip import MMCLIP


def term_gradients(engine: Any, batch: PlannedBatch, weights: Loss) -> dict[str, dict[str, float]]:
    """The gradient of every weighted term at the output of the `image` and of the `text` encoder, over the global batch.

    -> encoder -> {"contrastive": norm, "image": norm, "image_cosine": to the contrastive gradient, ...}. One forward pass more;
    the weights' own gradients stay as they are. A collective call. Not for ZeRO-3, whose hooks expect whole backward passes.
    """
    model: MMCLIP = engine.module
    outputs: dict[str, list[Tensor]] = {"image": [], "text": []}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs[name].append(output)

    encoders: dict[str, nn.Module] = {"image": model.image.vit.layernorm, "text": model.text}
    hooks = [encoder.register_forward_hook(keep(name)) for name, encoder in encoders.items()]
    try:
        losses = model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, produced in outputs.items():
        kept = [output for output in produced if output.requires_grad]
        pulls = {
            term: _flat(torch.autograd.grad(getattr(weights, term) * loss, kept, retain_graph=True, allow_unused=True), kept)
            for term, loss in losses.items()
        }
        found[name] = _norms_and_cosines(pulls)
    return found


def _flat(gradients: tuple[Tensor | None, ...], outputs: list[Tensor]) -> Tensor:
    pairs = zip(gradients, outputs, strict=True)
    return torch.cat([(torch.zeros_like(o) if g is None else g).flatten().double() for g, o in pairs])


def _norms_and_cosines(pulls: dict[str, Tensor]) -> dict[str, float]:
    """Over all ranks, of which each holds its own samples. The loss is the ranks' mean, hence the division."""
    reference = pulls.get("contrastive")
    others = [pull if reference is None else reference for pull in pulls.values()]
    summed = torch.stack([torch.stack([pull @ pull, pull @ other]) for pull, other in zip(pulls.values(), others, strict=True)])
    world = 1
    if dist.is_initialized():
        dist.all_reduce(summed)
        world = dist.get_world_size()
    lengths = summed[:, 0].sqrt()
    found = {term: float(length) / world for term, length in zip(pulls, lengths, strict=True)}
    if reference is not None:
        cosines = summed[:, 1] / (lengths * lengths[list(pulls).index("contrastive")]).clamp(min=1e-30)
        found |= {f"{term}_cosine": float(c) for term, c in zip(pulls, cosines, strict=True) if term != "contrastive"}
    return found
