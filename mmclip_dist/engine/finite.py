"""A step whose loss or gradients are not finite is skipped, on all ranks alike.

The optimizer skips it once the gradients of all ranks are summed. DeepSpeed does so under ZeRO 1 to 3 and in bf16 and fp16;
torch's optimizer, which it uses bare at stage 0 in fp32, is taught to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def poisoned(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, with gradients that are not finite either, so that the step is skipped.

    An infinite loss may have finite gradients. A test of the loss itself would make every step wait for the forward pass.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def skip_non_finite(optimizer: torch.optim.Optimizer) -> None:
    """Let a bare torch optimizer take no step where a gradient is not finite, and tell DeepSpeed by `overflow` as its own do."""

    def check(optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer.overflow = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # without a gradient, neither weight nor state is touched

    optimizer.register_step_pre_hook(check)
