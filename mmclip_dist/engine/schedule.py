"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mmclip_dist.config import Optim

_REFERENCE_BATCH = 1024


def learning_rate(step: int, optim: Optim) -> float:
    """Linear warm-up, then a cosine to 0 at `optim.steps`; the peak scales linearly with the global batch."""
    peak = optim.lr * optim.global_batch / _REFERENCE_BATCH
    warmup = optim.warmup * optim.steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (optim.steps - warmup)))
