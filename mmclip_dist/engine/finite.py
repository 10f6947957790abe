"""Skip a step on every rank if any gradient or loss is not finite.

The optimizer decides after the gradients of all ranks are summed, so all ranks agree. DeepSpeed does this under ZeRO 1 to 3 and
in bf16 and fp16. At stage 0 in fp32 it uses torch's optimizer directly, which `skip_non_finite` extends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself. If it is not finite, its gradients become NaN, so that the optimizer skips the step.

    An infinite loss may have finite gradients. A test of the loss itself would make every step wait for the forward pass.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def skip_non_finite(optimizer: torch.optim.Optimizer) -> None:
    """Make a torch optimizer skip steps with gradients that are not finite, and set `overflow` as DeepSpeed's optimizers do."""

    def check(optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer.overflow = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # without gradients, weights and state stay as they are

    optimizer.register_step_pre_hook(check)
