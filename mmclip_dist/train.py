"""Training: `deepspeed --module mmclip_dist.train RECIPE key=value ...`

Builds the sets, the loader, the model, the engine and the run folder, then loops. The state of a run is its weights,
its optimizer and one integer, the step: the order of samples, the learning rate and the random masks follow from it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmclip_kernels import check_impl
from mmclip_shards.chunks import Tally
from torch import Tensor

from mmclip_dist.config import Config, load_config
from mmclip_dist.data.batch import Batch, to_device
from mmclip_dist.data.example import ExampleMaker, MissingSidecar
from mmclip_dist.data.loader import build_loader, build_order, label_names, open_sets
from mmclip_dist.data.order import Order
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.engine import preemption, watchdog
from mmclip_dist.engine.checkpoint_folder import Meta
from mmclip_dist.engine.collective import agreed, first_rank_does, sums
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, set_learning_rate, start_distributed
from mmclip_dist.engine.gradient_cache import forward_backward, weighted_sum
from mmclip_dist.engine.health import Health
from mmclip_dist.engine.orphans import exit_with_launcher
from mmclip_dist.engine.preemption import StopRequest
from mmclip_dist.engine.quarantine import Quarantine
from mmclip_dist.engine.run import MetricsLog, describe, host_memory_gib, locked
from mmclip_dist.engine.weights import temperature
from mmclip_dist.model.build import build_model


def train(config: Config, stop: StopRequest) -> bool:
    """Train until `config.optim.last_step`, from the newest checkpoint of the run folder if there is one.

    True: to the end. False: until a stop was requested; starting again goes on.
    """
    config.check_sources()
    rank, world, device = start_distributed(config.threads, config.health.timeout_s)
    from mmclip_dist.engine.checkpoints import Checkpoints  # imports DeepSpeed, which had to be set up first

    config.check_world(world)
    check_impl(config.loss.impl, device)
    run_dir, first = Path(config.run_dir), rank == 0
    ds_json = deepspeed_json(config, world, gpu=device.type == "cuda")

    tokenizer = load_tokenizer(config.model.text.tokenizer or config.model.text.pretrained)
    sets = open_sets(config.data.sources, config.data, world)
    diseases = config.prompts.diseases or label_names(sets)
    order = build_order(sets, config.data, config.seed)
    maker = ExampleMaker(
        tokenizer, diseases, config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, config.data.augment, config.seed, needs_entities=config.loss.entity > 0,
    )  # fmt: skip

    with ExitStack() as held:
        held.callback(sets[0].chunks.close)
        with agreed():
            if first:
                held.enter_context(locked(run_dir))
                describe(run_dir, config, world, ds_json)
                stop.forget_file()
        trained_on = tuple(shard.sha256 for joined in sets for shard in joined.manifest.shards)
        engine = build_engine(build_model(config, tokenizer, diseases).to(device), config, ds_json)
        checkpoints = Checkpoints(run_dir, engine, tokenizer, config)
        step = checkpoints.resume(trained_on)
        batches = build_loader(
            sets, order, maker, data=config.data, global_batch=config.optim.global_batch, rank=rank, world=world, start=step
        )  # fmt: skip
        quarantine, health = Quarantine(run_dir, config.data.max_bad_fraction), Health(run_dir, config.health)
        log = ProgressLog(config, MetricsLog(run_dir, step) if first else None, step)
        if first:
            print(f"kernels: {config.loss.impl} on {device.type}", flush=True)
            print_sets(order, config)

        while step < config.optim.last_step and not stop.agreed:
            watchdog.beat("waiting for data", step + 1)
            batch = log.wait_for(batches)
            rate = set_learning_rate(engine, step, config)
            losses = forward_backward(engine, to_device(batch, device), config)
            engine.step()  # none, on all ranks, if a gradient of any is not finite
            step += 1
            told = sums(
                device, stop=stop.wanted(), writing=checkpoints.writing, loss=weighted_sum(losses, config.loss).detach(),
                replaced=len(batch["replaced"]), seen=len(batch["keys"]),
            )  # fmt: skip
            stop.agreed = told["stop"] > 0
            quarantine.count(batch, step, replaced=told["replaced"], seen=told["seen"])
            health.check(step, batch["keys"], told["loss"] / world, applied=engine.was_step_applied())
            if step % config.log_every == 0 or step in (1, config.optim.last_step):
                log.write(step, losses, rate, engine)
            if not told["writing"]:
                checkpoints.publish()
            if step % config.checkpoint.every == 0 or step == config.optim.last_step or stop.agreed:
                checkpoints.save(Meta(step, world, config.zero_stage, tuple(diseases), trained_on))
        checkpoints.finish()
        if step < config.optim.last_step:
            first_rank_does(lambda: stop.leave_mark(step), "leaving the mark of a stop")
        return step >= config.optim.last_step


def print_sets(order: Order, config: Config) -> None:
    for joined in order.sets:
        print(f"{config.data.sources[joined.number].url}: {joined.samples} samples, "
              f"{joined.remainder} of them left out of each epoch in turn", flush=True)  # fmt: skip


class ProgressLog:
    """Metrics of the global batch on the first rank: a row in metrics.jsonl and a line on the terminal."""

    def __init__(self, config: Config, metrics: MetricsLog | None, start: int) -> None:
        self.config, self.metrics = config, metrics
        self.last_step, self.last_time, self.waited, self.read = start, time.monotonic(), 0.0, Tally()

    def wait_for(self, batches: Any) -> Batch:
        """The next batch; the time it takes is the data's share of the step."""
        started = time.monotonic()
        batch: Batch = next(batches)
        self.waited += time.monotonic() - started
        watchdog.beat("forward, backward or optimizer step")
        self.read.add(batch["reading"])
        return batch

    def write(self, step: int, losses: dict[str, Tensor], rate: float, engine: Any) -> None:
        """A collective call: losses are means over all ranks, what was read from remote stores is summed."""
        values = torch.stack([value.detach().double().reshape(()) for value in losses.values()])
        values = torch.cat([values, values.new_tensor(list(asdict(self.read).values()))])
        dist.all_reduce(values)
        means = dict(zip(losses, (values[: len(losses)] / dist.get_world_size()).tolist(), strict=True))
        read = Tally(*values[len(losses) :].tolist())
        learned = temperature(engine)
        if self.metrics is None:
            return
        elapsed = time.monotonic() - self.last_time
        done = step - self.last_step
        samples_per_s = done * self.config.optim.global_batch / elapsed
        left = (self.config.optim.last_step - step) * elapsed / done
        row = {
            "step": step, "samples": step * self.config.optim.global_batch, "loss": means, "lr": rate,
            "temperature": learned, "samples_per_s": round(samples_per_s, 1),
            "data_wait": round(self.waited / elapsed, 4), "memory_gib": round(host_memory_gib(), 3),
            "read": {"mb_per_s": round(read.fetched / elapsed / 1e6, 2), "requests": int(read.requests),
                     "retries": int(read.retries), "cache_hits": int(read.cache_hits), "waited_s": round(read.waited_s, 3)},
        }  # fmt: skip
        self.metrics.write(row)
        store = (
            f" ({read.fetched / elapsed / 1e6:.0f} MB/s, {read.retries:.0f} retries, {read.cache_hits:.0f} cache hits)"
        )
        terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(
            f"step {step}/{self.config.optim.last_step}  {terms}  lr {rate:.2e}  {samples_per_s:.0f} samples/s  "
            f"data wait {row['data_wait']:.0%}{store if read.requests + read.cache_hits else ''}  {left:.0f} s left",
            flush=True,
        )
        self.last_step, self.last_time, self.waited, self.read = step, time.monotonic(), 0.0, Tally()


def main(arguments: list[str]) -> int:
    """Exit code 2 with one line for what a user can mend, `preemption.EXIT_CODE` after a stop on request."""
    arguments = [word for word in arguments if not word.startswith("--local_rank")]
    try:
        if not arguments:
            raise ValueError("usage: deepspeed --module mmclip_dist.train RECIPE [key=value ...]")
        config = load_config(arguments[0], arguments[1:])
        stop = StopRequest(Path(config.run_dir))
        exit_with_launcher(stop.ask)
        return 0 if train(config, stop) else preemption.EXIT_CODE
    except (ValueError, MissingSidecar) as error:
        if "MMCLIP_DEBUG" in os.environ:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
