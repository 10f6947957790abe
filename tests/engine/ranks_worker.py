"""One of the ranks of tests/engine/test_optimizer.py.

Trains a tiny model for a few steps in each case of cases.json, on this rank's part of batches.pt; the first rank writes
what it found to CASE.pt. One process runs all cases: starting ranks costs more than training them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmclip_dist.checkpoint import conversion
from mmclip_dist.config import Config, load_config
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.engine import deepspeed_engine, deepspeed_inside
from mmclip_dist.engine.gradient_cache import forward_backward
from mmclip_dist.engine.weights import averaged, averaged_weights, full_weights, temperature
from mmclip_dist.model.build import build_model
from tests.batches import in_passes


class Case:
    """A configuration, and this rank's batch of each step."""

    def __init__(self, config: Config, batches: list[Any], diseases: list[str]) -> None:
        self.config, self.batches, self.diseases = config, batches, diseases

    def engine(self, seed: int) -> Any:
        """Other seeds start from other weights."""
        tokenizer = load_tokenizer(str(self.config.model.text.tokenizer))
        model = build_model(self.config.model_copy(update={"seed": seed}), tokenizer, self.diseases)
        ds_json = deepspeed_engine.deepspeed_json(self.config, dist.get_world_size(), gpu=False)
        return deepspeed_engine.build_engine(model, self.config, ds_json)

    def train(self, engine: Any, step: int) -> list[float]:
        deepspeed_engine.set_learning_rate(engine, step, self.config.optim)
        batch = in_passes(self.batches[step % len(self.batches)], engine.module, self.config.optim.micro_batch)
        losses = forward_backward(engine, batch, self.config.loss)
        engine.step()
        return means(losses)

    def looked_at(self, engine: Any) -> list[float]:
        return means(engine.module(self.batches[0]))


def trained(case: Case, engine: Any) -> dict[str, Any]:
    """Every step's losses, gradient norm and weights, then the average in all the ways there are to see it."""
    found: dict[str, Any] = {"losses": [], "norms": [], "clipped": None, "weights": [full_weights(engine)]}
    found["average at first"] = averaged_weights(engine)
    for step in range(len(case.batches)):
        found["losses"].append(case.train(engine, step))
        norm = engine.get_global_grad_norm()
        found["norms"].append(None if norm is None else float(norm))  # not told at stage 0 in float32
        found["clipped"] = found["clipped"] or clipped_norm(engine, case.config)
        found["weights"].append(full_weights(engine))
    found["rates"] = sorted({group["lr"] for group in engine.optimizer.param_groups})
    found["temperature"] = temperature(engine)
    found["average"], found["weights after"] = averaged_weights(engine), full_weights(engine)
    found["losses before"] = case.looked_at(engine)
    with averaged(engine):
        found["losses averaged"] = case.looked_at(engine)
    found["losses after"] = case.looked_at(engine)
    return found


def reloaded(case: Case, engine: Any, folder: Path) -> dict[str, Any]:
    engine.save_checkpoint(str(folder), tag="saved", save_latest=False, client_state=conversion.CLIENT_STATE)
    second = case.engine(seed=7)
    second.load_checkpoint(str(folder), tag="saved")
    found = {"loaded": full_weights(second), "loaded average": averaged_weights(second)}
    second.destroy()
    return found


def converted(case: Case, engine: Any, folder: Path) -> dict[str, Any]:
    """One step further from DeepSpeed's universal form of what `reloaded` saved, and without the detour."""
    if dist.get_rank() == 0:
        conversion.convert(folder / "saved", folder / "scratch")
    dist.barrier()
    third = case.engine(seed=7)
    assert conversion.load_converted(third, folder / "scratch" / "universal")
    found = {"converted": full_weights(third), "converted average": averaged_weights(third)}
    for one, name in ((engine, "next"), (third, "next of converted")):
        case.train(one, len(case.batches))
        found |= {name: full_weights(one), f"{name}, average": averaged_weights(one)}
    third.destroy()
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
    deepspeed_inside.multiplies_fp16 = lambda: True


def main(folder: Path) -> None:
    deepspeed_engine.start_distributed(threads=1, timeout_s=600)
    cases = json.loads((folder / "cases.json").read_text())
    data = torch.load(folder / "batches.pt", weights_only=False)
    for name, (overrides, probe) in cases.items():
        if probe == "fp16":
            allow_fp16()
        config = load_config("quickstart", overrides)
        case = Case(config, [parts[dist.get_rank()] for parts in data["steps"]], data["diseases"])
        engine = case.engine(config.seed)
        found = trained(case, engine)
        if probe in ("checkpoint", "universal"):
            found |= reloaded(case, engine, folder / name)
        if probe == "universal":
            found |= converted(case, engine, folder / name)
        engine.destroy()
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
            print(f"{name} done", flush=True)
    dist.destroy_process_group()
