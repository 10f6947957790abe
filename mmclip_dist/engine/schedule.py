"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mmclip_dist.config import Optim

_REFERENCE_BATCH = 1024


def learning_rate(step: int, optim: Optim) -> float:
    """Linear warm-up, then `optim.schedule` down to 0 at `optim.steps`; the peak scales linearly with the global batch."""
    peak = optim.lr * optim.global_batch / _REFERENCE_BATCH
    warmup = optim.warmup * optim.steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if optim.schedule == "wsd":
        # Warm up, stay, decay: 1 - sqrt ends lower than a line does (Haegele et al., arXiv 2405.18392, figure 6).
        decay = optim.decay * optim.steps
        return peak * (1 - math.sqrt(max(0.0, step - (optim.steps - decay)) / decay))
    done = (step - warmup) / (optim.steps - warmup)
    return peak * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
