"""DeepSpeed from the config tree: its JSON, the process group and the engine."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from mmclip_dist.config import Config, Optim
from mmclip_dist.engine import deepspeed_inside, watchdog
from mmclip_dist.engine.collective import AgreedError, agreed
from mmclip_dist.engine.finite import skip_non_finite
from mmclip_dist.engine.layer_execution import checkpoint_activations, compile_encoders
from mmclip_dist.engine.optimizer import build_optimizer, layer_scales, parameter_groups
from mmclip_dist.engine.rendezvous import meet
from mmclip_dist.engine.schedule import learning_rate
from mmclip_dist.engine.stale_locks import refuse_stale_locks
from mmclip_dist.launcher import ranks_of_machine
from mmclip_dist.model.build import Trainable

_AFTER_WATCHDOG_S = 30.0  # the process group times out so much later than the watchdog, whose message names rank and step


def deepspeed_json(config: Config, world: int, *, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours. `config.deepspeed` adds to it and has the last word.

    ValueError where precision=fp16 asks for what the CPU cannot do.
    """
    optim, offload = config.optim, config.offload
    share = optim.global_batch // world
    micro = min(optim.micro_batch or share, share)
    passes = config.passes(world)
    if config.precision == "fp16" and not (gpu or deepspeed_inside.multiplies_fp16()):
        raise ValueError(
            "precision=fp16 on a CPU needs AVX512-FP16 (oneDNN multiplies float16 with nothing less, and DeepSpeed refuses "
            "without), which this one lacks: set precision=bf16 or fp32, or train on a GPU"
        )
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if offload.optimizer != "none":
        zero["offload_optimizer"] = {"device": offload.optimizer, "pin_memory": gpu}
    if offload.parameters != "none":
        zero["offload_param"] = {"device": offload.parameters, "pin_memory": gpu}
    derived: dict[str, Any] = {
        # DeepSpeed refuses any number but this product: optim.global_batch where shares are even. It only counts by it.
        "train_batch_size": micro * passes * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": optim.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},  # with a dynamic loss scale that starts at 2^16
        # We hand over our own optimizer (engine/optimizer.py), unless optim.name=deepspeed.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": optim.name in ("lamb", "sgd"),
        "steps_per_print": 10**9,  # never: run/log.py prints progress
    }
    return _merge(derived, config.deepspeed)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def start_distributed(threads: int | None, timeout_s: float) -> tuple[int, int, torch.device]:
    """Join the launcher's process group -> rank, world size, device. Needs the `deepspeed` launcher's environment.

    timeout_s: of a collective call, and of anything else that shows no progress. Mendable where the port is taken, OSError where
    the ranks cannot meet.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "training runs under a launcher: deepspeed --module mmclip_dist.train RECIPE key=value "
            "(on one machine without GPU: deepspeed --num_accelerators 2 --module ...)"
        )
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // ranks_of_machine()))
    deepspeed_inside.check_version()
    import deepspeed

    deepspeed_inside.leave_out_shared_memory_op()
    deepspeed_inside.silence_old_names()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    timeout, backend = timedelta(seconds=timeout_s + _AFTER_WATCHDOG_S), "nccl" if gpu else "gloo"
    store, rank, world = meet(timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)  # takes the group that is there
    watchdog.start(rank, timeout_s)
    return rank, world, device


def build_engine(model: Trainable, config: Config, json: dict[str, Any]) -> Any:
    """The DeepSpeed engine around the model, whose layers are compiled or recompute their activations as configured.

    A collective call; AgreedError where the configuration asks for what this machine or DeepSpeed cannot do.
    """
    import deepspeed

    optim, ours = config.optim, None
    with agreed():
        if config.model.compile:
            compile_encoders(model)
        if config.model.checkpoint_activations:
            checkpoint_activations(model)
        scales = layer_scales(model, optim.layer_decay, optim.encoder_rate) if optim.has_scales else {}
        groups = parameter_groups(model, optim, scales)
        if optim.name == "deepspeed":
            refuse_stale_locks()
        else:
            ours = build_optimizer(groups, optim, sharded=config.zero_stage > 0)
            deepspeed_inside.leave_muon_uncompiled()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=ours, model_parameters=groups if ours is None else None, config=json
    )
    if ours is not None:
        # At stage 0 in half precision DeepSpeed steps once on zero gradients to create the state (FP16_UnfusedOptimizer).
        # Adam's bias correction would then start one step late.
        ours.state.clear()
    elif optim.has_scales and any("lr_scale" not in group for group in engine.optimizer.param_groups):
        raise AgreedError(
            "deepspeed.optimizer makes parameter groups of its own: set optim.layer_decay=1 and optim.encoder_rate=1 for it"
        )
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # stage 0 in fp32: DeepSpeed does not wrap it
        skip_non_finite(engine.optimizer)
    return engine


def set_learning_rate(engine: Any, step: int, optim: Optim) -> float:
    """Give every parameter group the step's learning rate, times its `lr_scale`. Returns the rate itself."""
    rate = learning_rate(step, optim)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)  # DeepSpeed's own optimizers may regroup, without lr_scale
    return rate
