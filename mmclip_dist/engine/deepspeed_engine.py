"""DeepSpeed from the config tree: its JSON, the parameter groups and the engine."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from mmclip_dist.config import Config
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.health import skip_non_finite
from mmclip_dist.engine.schedule import learning_rate

_AFTER_WATCHDOG_S = 30.0  # that the process group waits longer: its message names neither rank nor step


def deepspeed_json(config: Config, world: int, *, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, derived; `config.deepspeed` adds to it and wins."""
    optim = config.optim
    derived: dict[str, Any] = {
        "train_batch_size": optim.global_batch,
        "train_micro_batch_size_per_gpu": optim.global_batch // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        "optimizer": {
            "type": "AdamW",
            # DeepSpeed's own Adam is a C++ or CUDA op built at first use; torch's fused one is on par on a GPU.
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "weight_decay": optim.weight_decay,
                "torch_adam": True,
            }
            | ({"fused": True} if gpu else {}),
        },
        "steps_per_print": 10**9,  # the progress line is ours
    }
    return _merge(derived, config.deepspeed)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, single tokens and the temperature do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.squeeze().ndim >= 2 else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def start_distributed(threads: int | None, timeout_s: float) -> tuple[int, int, torch.device]:
    """Join the launcher's process group -> rank, world size, device. Needs the `deepspeed` launcher's environment.

    timeout_s: of a collective call, and of anything else that shows no progress.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "training runs under a launcher: deepspeed --module mmclip_dist.train RECIPE key=value "
            "(on one machine without GPU: deepspeed --num_accelerators 2 --module ...)"
        )
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local))
    import deepspeed
    import deepspeed.ops

    # DeepSpeed's shared-memory op serves inference on CPUs alone. Joining would compile it (a compiler for nothing, and a
    # killed build leaves a lock file that every later run waits on without end) and map 66 MiB of /dev/shm per rank that
    # no process ever removes, killed or not. Marked as not available, it is left out (DeepSpeed 0.19, comm/torch.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo", verbose=False, timeout=timedelta(seconds=timeout_s + _AFTER_WATCHDOG_S)
    )
    watchdog.start(torch.distributed.get_rank(), timeout_s)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def build_engine(model: nn.Module, config: Config, json: dict[str, Any]) -> Any:
    """The DeepSpeed engine around the model."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model, config.optim.weight_decay), config=json
    )
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # stage 0 in fp32: none of DeepSpeed's own
        skip_non_finite(engine.optimizer)
    return engine


def set_learning_rate(engine: Any, step: int, config: Config) -> float:
    """Give every parameter group the step's learning rate, and return it."""
    rate = learning_rate(step, config.optim)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    return rate
