"""The engine's overhead: steps of the training loop, and of the bare model and optimizer, in turn on the same batches."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import statistics
import tempfile
from collections.abc import Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch

from mmclip_dist.bench.variants import SHAPES, AdamW, Sample, build, loss_of, make_sample, seconds
from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch, to_device
from mmclip_dist.engine.feed import Feed
from mmclip_dist.engine.gradient_cache import forward_backward, weighted_sum
from mmclip_dist.run.guard import Guard
from mmclip_dist.run.log import ProgressLog
from mmclip_dist.run.stop import StopRequest

VARIANT = "MMCLIP feature"
SAMPLES = 4


def measure(name: str, batch: int, rounds: int, device: torch.device) -> dict[str, str | int | float]:
    """One row, in milliseconds. Starts a process group and the watchdog, so it needs a process of its own."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        os.environ[key] = value
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, start_distributed

    start_distributed(1, 600.0)  # one thread on a CPU
    model, bare = (build(SHAPES[name], VARIANT, device, batch) for _ in range(2))
    config = model.config
    engine = build_engine(model, config, deepspeed_json(config, 1, gpu=device.type == "cuda"))
    optimizer = AdamW(list(bare.parameters()))
    samples = [make_sample(bare, SHAPES[name], batch, 0.0, seed, torch.device("cpu")) for seed in range(SAMPLES)]
    bare_times: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        loop = _Loop(engine, config, Path(folder), device, cycle(sample.batch for sample in samples))
        for turn in range(rounds + 1):
            sample = samples[turn % SAMPLES]
            loop.step()
            bare_times.append(_bare_step(bare, optimizer, sample, config, device))
    torch.distributed.destroy_process_group()
    return _row(name, batch, loop.times[1:], bare_times[1:])  # the first round warms up


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _row(name: str, batch: int, loop: list[list[float]], bare: list[list[float]]) -> dict[str, str | int | float]:
    """loop: data wait, forward and backward, optimizer, the rest. bare: forward and backward, optimizer."""
    wait, model, optimizer, rest = (1000 * statistics.median(column) for column in zip(*loop, strict=True))
    bare_model, bare_optimizer = (1000 * statistics.median(column) for column in zip(*bare, strict=True))
    more = [sum(ours[1:]) / sum(theirs) - 1 for ours, theirs in zip(loop, bare, strict=True)]
    own = [ours[3] / sum(theirs) for ours, theirs in zip(loop, bare, strict=True)]
    figures = {
        "bare model": bare_model, "bare optimizer": bare_optimizer, "loop: model": model, "loop: optimizer": optimizer,
        "loop: the rest": rest, "data wait": wait,
    }  # fmt: skip
    told = {key: round(value, 1) for key, value in figures.items()}
    return {"shape": name, "batch": batch, **told, "overhead": _percent(more), "ours": _percent(own)}


def _percent(shares: list[float]) -> str:
    return f"{100 * statistics.median(shares):.2f}%"


def _bare_step(model: Any, optimizer: AdamW, sample: Sample, config: Config, device: torch.device) -> list[float]:
    """Seconds of forward and backward, and of clipping and AdamW."""
    batch = to_device(sample.batch, device)
    marks = [seconds(device)]
    loss_of(model, VARIANT, sample._replace(batch=batch)).backward()
    marks.append(seconds(device))
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    optimizer.step()
    marks.append(seconds(device))
    return [end - start for start, end in pairwise(marks)]


class _Loop:
    """The loop's body of `train.py`, with a clock between its parts."""

    def __init__(self, engine: Any, config: Config, folder: Path, device: torch.device, batches: Iterator[Batch]) -> None:
        self.engine, self.config, self.device = engine, config, device
        self.guard = Guard(folder, StopRequest(folder), config.health, config.data.max_bad_fraction, device)
        self.log = ProgressLog(config.model_copy(update={"run_dir": str(folder)}), None, 0, device)
        self.batches = self.guard.counted(Feed(batches, engine.module.text.width, 1, config.shares, device))
        self.times: list[list[float]] = []

    def step(self) -> None:
        from mmclip_dist.engine import watchdog
        from mmclip_dist.engine.deepspeed_engine import set_learning_rate

        engine, config, device, step = self.engine, self.config, self.device, len(self.times)
        marks = [seconds(device)]
        watchdog.beat("waiting for data", step + 1)
        batch = self.log.wait_for(self.batches)
        marks.append(seconds(device))
        rate = set_learning_rate(engine, step, config.optim)
        losses = forward_backward(engine, batch, config.loss)
        marks.append(seconds(device))
        engine.step()
        marks.append(seconds(device))
        step += 1
        loss = weighted_sum(losses, config.loss)
        self.guard.after_step(step, batch, loss, applied=engine.was_step_applied(), writing=False)
        if step % config.log_every == 0 or step == 1:
            with contextlib.redirect_stdout(io.StringIO()):
                self.log.write(step, losses, rate, engine)
        marks.append(seconds(device))
        self.times.append([end - start for start, end in pairwise(marks)])
