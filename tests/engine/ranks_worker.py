"""One of the ranks of tests/engine/test_optimizer.py: `python ranks_worker.py FOLDER`, under a launcher's environment.

Trains a tiny model for a few steps in each case of cases.json, on this rank's part of batches.pt; the first rank writes
what it found to CASE.pt. One process runs all cases: starting ranks costs more than training them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmclip_dist.config import Config, load_config
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.engine import deepspeed_engine
from mmclip_dist.engine.gradient_cache import forward_backward
from mmclip_dist.engine.weights import averaged, averaged_weights, full_weights, set_average, temperature
from mmclip_dist.model.build import build_model


def run(folder: Path, config: Config, steps: list[list[Any]], diseases: list[str], probe: str | None) -> dict[str, Any]:
    if probe == "fp16":
        allow_fp16()
    ds_json = deepspeed_engine.deepspeed_json(config, dist.get_world_size(), gpu=False)

    def new_engine(seed: int) -> Any:
        tokenizer = load_tokenizer(str(config.model.text.tokenizer))
        model = build_model(config.model_copy(update={"seed": seed}), tokenizer, diseases)
        return deepspeed_engine.build_engine(model, config, ds_json)

    engine = new_engine(config.seed)
    own = [parts[dist.get_rank()] for parts in steps]
    found: dict[str, Any] = {"losses": [], "norms": [], "clipped": None, "weights": [full_weights(engine)]}
    found["average at first"] = averaged_weights(engine)
    for step, batch in enumerate(own):
        deepspeed_engine.set_learning_rate(engine, step, config)
        losses = forward_backward(engine, batch, config)
        engine.step()
        found["losses"].append(means(losses))
        norm = engine.get_global_grad_norm()
        found["norms"].append(None if norm is None else float(norm))  # not told at stage 0 in float32
        found["clipped"] = found["clipped"] or clipped_norm(engine, config)
        found["weights"].append(full_weights(engine))
    found["rates"] = sorted({group["lr"] for group in engine.optimizer.param_groups})
    found["temperature"] = temperature(engine)
    found["average"], found["weights after"] = averaged_weights(engine), full_weights(engine)
    found["losses before"] = means(engine.module(own[0]))
    with averaged(engine):
        found["losses averaged"] = means(engine.module(own[0]))
    found["losses after"] = means(engine.module(own[0]))
    if probe == "checkpoint":
        engine.save_checkpoint(str(folder / "checkpoint"), tag="saved", save_latest=False)
        second = new_engine(seed=7)
        second.load_checkpoint(str(folder / "checkpoint"), tag="saved")
        found["loaded"], found["loaded average"] = full_weights(second), averaged_weights(second)
        given: list[Any] = [{name: value + 1 for name, value in found["average"].items()}]
        dist.broadcast_object_list(given)
        set_average(second, given[0])
        found["set average"], found["weights after setting"] = averaged_weights(second), full_weights(second)
        second.destroy()
    engine.destroy()
    return found


def means(losses: dict[str, Any]) -> list[float]:
    """Over the ranks: the losses of the global batch."""
    values = torch.stack([value.detach().double().reshape(()) for value in losses.values()])
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def clipped_norm(engine: Any, config: Config) -> float:
    """Norm over all ranks of the gradient that the first step took, from the first moments that it left."""
    square = torch.zeros(1, dtype=torch.float64)
    for state in engine.basic_optimizer.state.values():
        square += state["exp_avg"].double().square().sum()
    if config.zero_stage > 0:
        dist.all_reduce(square)
    return float(square.sqrt()) / (1 - config.optim.betas[0])


def allow_fp16() -> None:
    """Without AVX512-FP16 it is slow, but as exact: gloo and torch know float16 on every CPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    deepspeed_engine._multiplies_fp16 = lambda: True


def main(folder: Path) -> None:
    deepspeed_engine.start_distributed(threads=1)
    cases = json.loads((folder / "cases.json").read_text())
    data = torch.load(folder / "batches.pt", weights_only=False)
    for name, (overrides, probe) in cases.items():
        config = load_config("quickstart", overrides)
        found = run(folder, config, data["steps"], data["diseases"], probe)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
            print(f"{name} done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
