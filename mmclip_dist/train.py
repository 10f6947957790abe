"""Training: `deepspeed --module mmclip_dist.train RECIPE key=value ...`

Builds the sets, the loader, the model, the engine and the run folder, then loops. The state of a run is its weights,
its optimizer and one integer, the step: the order of samples, the learning rate and the random masks follow from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from mmclip_kernels import check_impl

from mmclip_dist.config import Config, load_config
from mmclip_dist.data.batch import to_device
from mmclip_dist.data.example import ExampleMaker, MissingSidecar
from mmclip_dist.data.loader import build_loader, build_order, label_names, open_sets
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.engine import checkpoint
from mmclip_dist.engine.checkpoint_folder import Meta
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, set_learning_rate, start_distributed
from mmclip_dist.engine.gradient_cache import forward_backward
from mmclip_dist.engine.orphans import exit_with_launcher
from mmclip_dist.engine.progress_log import ProgressLog
from mmclip_dist.engine.quarantine import Quarantine
from mmclip_dist.engine.run import MetricsLog, describe, locked
from mmclip_dist.engine.trackers import check_trackers, open_trackers
from mmclip_dist.model.build import build_model


def train(config: Config) -> None:
    """Train until `config.optim.last_step`, from the newest checkpoint of the run folder if there is one."""
    config.check_sources()
    check_trackers(config.track)
    rank, world, device = start_distributed(config.threads)
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
        engine = build_engine(build_model(config, tokenizer, diseases).to(device), config, ds_json)
        step = checkpoint.resume(run_dir, engine, config)
        batches = build_loader(
            sets, order, maker, data=config.data, global_batch=config.optim.global_batch, rank=rank, world=world, start=step
        )  # fmt: skip
        quarantine = Quarantine(run_dir, config.data.max_bad_fraction, device)
        with agreed():
            tracker = held.enter_context(open_trackers(config, step)) if first else None
        log = ProgressLog(config, MetricsLog(run_dir, step) if first else None, tracker, step, device)
        trained_on = tuple(shard.sha256 for joined in sets for shard in joined.manifest.shards)
        if first:
            print(f"kernels: {config.loss.impl} on {device.type}", flush=True)
            for joined in order.sets:
                print(f"{config.data.sources[joined.number].url}: {joined.samples} samples, "
                      f"{joined.remainder} of them left out of each epoch in turn", flush=True)  # fmt: skip

        while step < config.optim.last_step:
            batch = log.wait_for(batches)
            rate = set_learning_rate(engine, step, config)
            losses = forward_backward(engine, to_device(batch, device), config)
            engine.step()
            step += 1
            quarantine.count(batch, step)
            if step % config.log_every == 0 or step in (1, config.optim.last_step):
                log.write(step, losses, rate, engine)
            if step % config.checkpoint.every == 0 or step == config.optim.last_step:
                meta = Meta(step, world, config.zero_stage, tuple(diseases), trained_on)
                checkpoint.save(run_dir, engine, tokenizer, config, meta)


@contextmanager
def agreed() -> Iterator[None]:
    """What one rank refuses, all refuse: a ValueError inside is raised on every rank, so that none waits for another."""
    refused = None
    try:
        yield
    except ValueError as error:
        refused = str(error)
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refused)
    for refusal in refusals:
        if refusal is not None:
            raise ValueError(refusal)


def main(arguments: list[str]) -> int:
    """Exit code 2 with one line for what a user can mend."""
    arguments = [word for word in arguments if not word.startswith("--local_rank")]
    try:
        if not arguments:
            raise ValueError("usage: deepspeed --module mmclip_dist.train RECIPE [key=value ...]")
        exit_with_launcher()
        train(load_config(arguments[0], arguments[1:]))
    except (ValueError, MissingSidecar) as error:
        if "MMCLIP_DEBUG" in os.environ:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
