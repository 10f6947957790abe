"""Collect whole weights from an engine whose ZeRO stage spreads them over ranks. Every function is a collective call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mmclip_dist.engine import deepspeed_inside
from mmclip_dist.engine.optimizer import AVERAGE


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The optimizer's float32 weights, and the buffers, by their names in `state_dict`: on the CPU of rank 0, {} elsewhere."""
    first, masters = dist.get_rank() == 0, deepspeed_inside.masters(engine)
    parameters = dict(engine.module.named_parameters())
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        whole = _whole(parameter, masters)  # one at a time: no rank ever holds the whole model
        if first:
            found[name] = whole.detach().float().cpu().contiguous().clone()
    if first:
        state = engine.module.state_dict()
        found |= {name: value.detach().float().cpu().contiguous() for name, value in state.items() if name not in parameters}
    return found


def _whole(parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = safe_get_full_fp32_param(parameter)
    return masters.get(parameter, parameter) if sharded is None else sharded


def averaged_weights(engine: Any) -> dict[str, Tensor]:
    """Like `full_weights`, of the exponential average. Before the first step the average is the weights themselves."""
    _exchange(engine)
    try:
        return full_weights(engine)
    finally:
        _exchange(engine)


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """Use averaged weights inside the block; restore the originals exactly afterwards."""
    _exchange(engine)
    deepspeed_inside.refresh_weights(engine)
    try:
        yield
    finally:
        _exchange(engine)
        deepspeed_inside.refresh_weights(engine)


def _exchange(engine: Any) -> None:
    """Swap weights and averages where the optimizer keeps them; no communication."""
    for weight, state in engine.basic_optimizer.state.items():
        if AVERAGE in state:
            held = weight.detach().clone()
            weight.data.copy_(state[AVERAGE])
            state[AVERAGE].copy_(held)


def temperature(engine: Any) -> float:
    """The model's temperature, from the optimizer's float32 weight.

    Do not gather the model's own at stage 3: DeepSpeed keeps small weights whole between steps, gathering would partition
    this one, and the next backward pass would fail.
    """
    model = engine.module
    learned = _whole(model.log_scale, deepspeed_inside.masters(engine)).detach().float()
    learned = learned.clamp(max=math.log(model.config.model.max_scale))
    return float(learned.neg().exp())
