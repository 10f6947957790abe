"""Measures what steps of real DeepSpeed engines allocate, in processes of their own (DeepSpeed keeps its first process group).

`main` prints the bytes of each case as JSON. On a GPU the allocator's own peak counts, else that of `LiveMemory`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch, to_device
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, start_distributed
from mmclip_dist.engine.gradient_cache import forward_backward
from tests.batches import in_passes
from tests.model.synthetic_batch import batch_of, config_of, load_of, model_of
from tests.plan.live_memory import LiveMemory

BUCKET = 100_000


def measured(case: dict[str, Any], device: torch.device) -> int:
    """Most bytes allocated in the second step of an engine: the first one makes Adam's moments."""
    ranks = dist.get_world_size()
    config = config_of(*case["overrides"], batch=case["batch"] * ranks, precision=case["precision"])
    load = load_of(config, tokens=case["tokens"], masked=case["masked"], scored=config.attmim.mode == "feature", ranks=ranks)
    document = deepspeed_json(config, ranks, gpu=device.type == "cuda")
    document["zero_optimization"] = {"stage": case["stage"], "reduce_bucket_size": BUCKET, "overlap_comm": False}
    before = torch.cuda.memory_allocated() if device.type == "cuda" else LiveMemory().alive
    engine = build_engine(model_of(config, load.prompts // 2).to(device), config, document)
    step(engine, to_device(batch_of(config, load), device), config)
    data = to_device(batch_of(config, load), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(engine, data, config)
        return torch.cuda.max_memory_allocated() - before
    with LiveMemory() as live:
        step(engine, data, config)
    return live.peak - before


def step(engine: Any, data: Batch, config: Config) -> None:
    forward_backward(engine, in_passes(data, engine.module, config.optim.micro_batch), config.loss)
    engine.step()


def main(cases: list[dict[str, Any]]) -> None:
    *_, where = start_distributed(threads=1, timeout_s=600)
    print("MEASURED " + json.dumps([measured(case, where) for case in cases]))
    dist.destroy_process_group()
