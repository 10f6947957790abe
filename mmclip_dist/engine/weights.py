"""Whole weights out of an engine whose ZeRO stage spreads them over ranks. Every function is a collective call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mmclip_dist.engine.optimizer import AVERAGE


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The optimizer's own float32 weights, and buffers, by their names in `state_dict`: on the first rank's CPU, {} elsewhere."""
    first, masters = dist.get_rank() == 0, _masters(engine)
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


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """At stage 0 in half precision: the float32 weight of each parameter. ZeRO keeps its own account of them."""
    if engine.zero_optimization_stage() > 0 or not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {half: master for halves, masters in pairs for half, master in zip(halves, masters, strict=True)}


def _whole(parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = safe_get_full_fp32_param(parameter)
    return masters.get(parameter, parameter) if sharded is None else sharded


def averaged_weights(engine: Any) -> dict[str, Tensor]:
    """Like `full_weights`, of the exponential average; before the first step that is the weights themselves."""
    _exchange(engine)
    try:
        return full_weights(engine)
    finally:
        _exchange(engine)


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """The model computes with the average of the weights inside, and with the very weights of before after it."""
    _exchange(engine)
    _refresh(engine)
    try:
        yield
    finally:
        _exchange(engine)
        _refresh(engine)


def _exchange(engine: Any) -> None:
    """Swap weights and averages where the optimizer keeps them; no communication."""
    for weight, state in engine.basic_optimizer.state.items():
        if AVERAGE in state:
            held = weight.detach().clone()
            weight.data.copy_(state[AVERAGE])
            state[AVERAGE].copy_(held)


def _refresh(engine: Any) -> None:
    """Bring the weights that the model computes with up to date with the optimizer's, as DeepSpeed does after a step."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for half, master in _masters(engine).items():
            half.data.copy_(master)


def temperature(engine: Any) -> float:
    """The model's temperature, from the optimizer's float32 weight.

    Not by gathering the model's own: at stage 3 that would cut a weight that DeepSpeed keeps whole between steps, and the next
    backward pass would fail.
    """
    model = engine.module
    learned = _whole(model.log_scale, _masters(engine)).detach().float().clamp(max=math.log(model.config.model.max_scale))
    return float(learned.neg().exp())
