"""What a user sees of a run: progress line, metrics.jsonl and trackers, all from one row about the global batch."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmclip_shards.chunks import Tally
from torch import Tensor

from mmclip_dist.config import Config
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.collective import agreed
from mmclip_dist.engine.term_gradients import term_gradients
from mmclip_dist.engine.weights import temperature
from mmclip_dist.model.inputs import PlannedBatch
from mmclip_dist.model.mmclip import MMCLIP
from mmclip_dist.plan import cost
from mmclip_dist.plan.cards import Card, card_of_device
from mmclip_dist.run.metrics import EVALUATIONS, METRICS, MetricsLog
from mmclip_dist.run.trackers import Tracker, flat, open_trackers

_COUNTS = ("reports", "tokens", "masked", "scored")


class ProgressLog:
    """Metrics of the global batch since the last row. Every rank counts; rank 0 writes to the run folder and to `tracker`."""

    def __init__(self, config: Config, tracker: Tracker | None, start: int, device: torch.device) -> None:
        self.config, self.tracker, self.device = config, tracker, device
        folder, first = Path(config.run_dir), dist.get_rank() == 0
        self.metrics, self.evaluations = (MetricsLog(folder, start, name) if first else None for name in (METRICS, EVALUATIONS))
        self.card = card_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._begin(start)

    def _begin(self, step: int) -> None:
        self.last_step, self.last_time, self.waited, self.beside, self.read = step, time.monotonic(), 0.0, 0.0, Tally()
        self.processor, self.processor_beside = time.process_time(), 0.0
        self.counts = dict.fromkeys(_COUNTS, 0.0)

    def wait_for(self, batches: Iterator[PlannedBatch]) -> PlannedBatch:
        """The next batch. The time it takes counts as waiting for data."""
        started = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - started
        watchdog.beat("forward, backward or optimizer step")
        self.read.add(batch["reading"])
        plan = batch["plan"]
        for name, value in zip(_COUNTS, (len(plan.paired), plan.tokens, len(plan.masked), plan.unscored), strict=True):
            self.counts[name] += value
        return batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the time inside (evaluation, saving) from speed, MFU and the estimate of the time left."""
        started, used = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.beside += time.monotonic() - started
            self.processor_beside += time.process_time() - used

    def gradients(self, step: int, engine: Any, batch: PlannedBatch) -> dict[str, dict[str, float]] | None:
        """The gradient of each term, if it belongs to this step's row; see `engine.term_gradients`. A collective call."""
        if not self.config.log_gradients or step % (10 * self.config.log_every):
            return None
        with self.aside():
            return term_gradients(engine, batch, self.config.loss)

    def write(
        self, step: int, losses: dict[str, Tensor], rate: float, engine: Any, gradients: dict[str, dict[str, float]] | None = None
    ) -> None:
        """Write a row: losses are means over all ranks, reading is summed, waiting and memory are maxima. A collective call."""
        learned = temperature(engine) if isinstance(engine.module, MMCLIP) else None  # on every rank: ZeRO-3 gathers it
        means, read, counts = self._over_ranks(losses)  # waits for the device, so read the clock afterwards
        elapsed, done = time.monotonic() - self.last_time - self.beside, step - self.last_step
        worst = torch.tensor([self.waited / elapsed, *self._memory()], dtype=torch.float64, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if self.metrics is not None:
            wait, host, host_peak, device_peak = worst.tolist()
            batch, world = self.config.optim.global_batch, dist.get_world_size()
            row = {
                "step": step, "samples": step * batch, "loss": means, "lr": rate,
                **({} if learned is None else {"temperature": learned}),
                "samples_per_s": round(done * batch / elapsed, 1),
                "samples_per_s_per_rank": round(done * batch / elapsed / world, 2),
                "data_wait": round(min(wait, 1.0), 4), "memory_gib": round(host, 3), "memory_peak_gib": round(host_peak, 3),
                "aside_s": round(self.beside, 3),
                "processor_s": round(time.process_time() - self.processor - self.processor_beside, 3),
                "eta_s": round((self.config.optim.last_step - step) * elapsed / done, 1),
                "read": {"mb_per_s": round(read.fetched / elapsed / 1e6, 2), "requests": int(read.requests),
                         "retries": int(read.retries), "hedges": int(read.hedges), "cache_hits": int(read.cache_hits),
                         "waited_s": round(read.waited_s, 3)},
            }  # fmt: skip
            if gradients is not None:
                row["gradients"] = gradients
            if self.device.type == "cuda":
                row["device_peak_gib"] = round(device_peak, 3)
            if self.card is not None and isinstance(engine.module, MMCLIP):
                load = load_of_steps(counts, engine.module, batch=batch, world=world, steps=done)
                row["mfu"] = round(utilisation(self.config, engine.module, load, self.card, elapsed / done), 4)
            self.metrics.write(row)
            if self.tracker is not None:
                self.tracker.write(step, flat(row))
            print(progress_line(row, self.config.optim.last_step), flush=True)
        self._begin(step)

    def evaluated(self, step: int, scores: dict[str, float] | None) -> None:
        """Write the scores of a step. None: a stop interrupted the evaluation."""
        if self.evaluations is None:
            return
        if scores:
            self.evaluations.write({"step": step, "auc": scores})
            if self.tracker is not None:
                self.tracker.write(step, flat({"auc": scores}))
        told = "broken off by a stop" if scores is None else f"macro AUC {scores['macro']:.4f}" if scores else "no class to score"
        kind = "validation" if self.config.finetune else "zero-shot evaluation"
        print(f"step {step}/{self.config.optim.last_step}  {kind}: {told}", flush=True)

    def _over_ranks(self, losses: dict[str, Tensor]) -> tuple[dict[str, float], Tally, dict[str, float]]:
        values = torch.stack([value.detach().double().reshape(()) for value in losses.values()])
        counted = values.new_tensor([*asdict(self.read).values(), *self.counts.values()])
        values = torch.cat([values, counted])
        dist.all_reduce(values)
        summed = values.tolist()
        means = {name: total / dist.get_world_size() for name, total in zip(losses, summed, strict=False)}
        read = Tally(*summed[len(losses) : -len(_COUNTS)])
        return means, read, dict(zip(_COUNTS, summed[-len(_COUNTS) :], strict=True))

    def _memory(self) -> tuple[float, float, float]:
        """GiB: of this process now, its maximum so far, and the maximum on its device since the last row."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts in KiB
        now, device = host_memory_gib(), 0.0
        if self.device.type == "cuda":
            device = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        return now, max(now, peak), device  # the kernel's maximum may lag behind


@contextmanager
def open_log(config: Config, step: int, device: torch.device) -> Iterator[ProgressLog]:
    """The log of a run that goes on from `step`, with its trackers on rank 0. A collective call; AgreedError if a tracker cannot
    start."""
    with ExitStack() as held:
        tracker = None
        with agreed():
            if dist.get_rank() == 0:
                tracker = held.enter_context(open_trackers(config, step))
            log = ProgressLog(config, tracker, step, device)
        yield log


def load_of_steps(counts: dict[str, float], model: MMCLIP, *, batch: int, world: int, steps: int) -> cost.Load:
    """The mean step of one rank, from what all ranks counted in `steps` steps. Padding is not work and does not count."""
    reports = max(counts["reports"], 1.0)
    return cost.Load(
        images=batch // world, reports=counts["reports"] / steps / world, tokens=counts["tokens"] / reports,
        masked=counts["masked"] / reports, prompts=model.prompt_mask.shape[1],
        prompt_tokens=float(model.prompt_mask.float().sum(2).mean()) if model.prompt_mask.numel() else 0.0,
        vocabulary=model.text_decoder.head.out_features, texts=counts["reports"] / steps,
        scored=counts["scored"] / steps / batch,
    )  # fmt: skip


def utilisation(config: Config, model: MMCLIP, load: cost.Load, card: Card, seconds: float) -> float:
    """Model FLOP/s of a rank over its card's peak, dense bf16 or float32 as the run computes."""
    number, peak = (4, card.flops_fp32) if config.precision == "fp32" else (2, card.flops)
    return cost.training_flops(cost.pieces(as_built(config, model), load, number)) / seconds / peak


def as_built(config: Config, model: MMCLIP) -> Config:
    """The configuration with the encoders' real shapes: pretrained encoders have their own."""
    shapes = {}
    for part, found in (("image", model.image.vit.config), ("text", model.text.bert.config)):
        shape = {"width": found.hidden_size, "depth": found.num_hidden_layers, "heads": found.num_attention_heads}
        shapes[part] = getattr(config.model, part).model_copy(update=shape)
    return config.model_copy(update={"model": config.model.model_copy(update=shapes)})


def progress_line(row: dict[str, Any], last_step: int) -> str:
    """One row as one line, without what is unknown (MFU of an unknown card, device memory of a CPU)."""
    read = row["read"]
    parts = [f"step {row['step']}/{last_step}", *(f"{name} {value:.4f}" for name, value in row["loss"].items())]
    parts += [f"lr {row['lr']:.2e}", *([f"temperature {row['temperature']:.4f}"] if "temperature" in row else [])]
    parts += [f"{row['samples_per_s']:.0f} samples/s ({row['samples_per_s_per_rank']:.1f} a rank)"]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    store = f" ({read['mb_per_s']:.0f} MB/s, {read['retries']} retries, {read['cache_hits']} cache hits)"
    parts.append(f"data wait {row['data_wait']:.0%}{store if read['requests'] + read['cache_hits'] else ''}")
    device = f", device {row['device_peak_gib']:.1f}" if "device_peak_gib" in row else ""
    parts.append(f"memory {row['memory_peak_gib']:.1f}{device} GiB")
    parts.append(f"{timedelta(seconds=round(row['eta_s']))} left")
    return "  ".join(parts)


def host_memory_gib() -> float:
    """Resident memory of this process, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
