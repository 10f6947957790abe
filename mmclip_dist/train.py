"""Training: `deepspeed --module mmclip_dist.train RECIPE key=value ...`

Builds the sets, the loader, the model, the engine and the run folder, then loops. The state of a run is its weights,
its optimizer and one integer, the step: the order of samples, the learning rate and the random masks follow from it.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from mmclip_kernels import check_impl

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.config import Config, load_config
from mmclip_dist.data.batch import to_device
from mmclip_dist.data.example import MissingSidecar
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.data.training import open_training_data
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.collective import agreed, first_rank_does
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, set_learning_rate, start_distributed
from mmclip_dist.engine.gradient_cache import forward_backward, weighted_sum
from mmclip_dist.evaluate.during_training import EvaluationDuringTraining
from mmclip_dist.model.build import build_model
from mmclip_dist.run.folder import describe, locked
from mmclip_dist.run.guard import Guard
from mmclip_dist.run.log import open_log
from mmclip_dist.run.orphans import exit_with_launcher
from mmclip_dist.run.stop import EXIT_CODE, StopRequest
from mmclip_dist.run.trackers import check_trackers


def train(config: Config, stop: StopRequest) -> bool:
    """Train until `config.optim.last_step`, from the newest checkpoint of the run folder if there is one.

    True: to the end. False: until a stop was requested; starting again goes on.
    """
    rank, world, device = join_ranks(config)
    from mmclip_dist.checkpoint.store import Checkpoints  # imports DeepSpeed, which had to be set up first

    run_dir, first = Path(config.run_dir), rank == 0
    ds_json = deepspeed_json(config, world, gpu=device.type == "cuda")
    tokenizer = load_tokenizer(config.model.text.tokenizer or config.model.text.pretrained)
    with ExitStack() as held:
        data = held.enter_context(open_training_data(config, tokenizer, world))
        with agreed():
            evaluation = EvaluationDuringTraining(config, tokenizer, data.trained_on) if config.evaluation.sets else None
            if first:
                held.enter_context(locked(run_dir))
                describe(run_dir, config, world, ds_json)
                stop.forget_file()
        engine = build_engine(build_model(config, tokenizer, data.diseases).to(device), config, ds_json)
        checkpoints = Checkpoints(run_dir, engine, tokenizer, config)
        step = checkpoints.resume(data.trained_on)
        batches = data.batches(rank, world, step)
        guard = Guard(run_dir, stop, config.health, config.data.max_bad_fraction, device)
        log = held.enter_context(open_log(config, step, device))
        if first:
            print(f"kernels: {config.loss.impl} on {device.type}\n{data}", flush=True)

        while step < config.optim.last_step and not stop.agreed:
            watchdog.beat("waiting for data", step + 1)
            batch = log.wait_for(batches)
            rate = set_learning_rate(engine, step, config)
            losses = forward_backward(engine, to_device(batch, device), config)
            engine.step()  # none, on all ranks, if a gradient of any is not finite
            step += 1
            loss = weighted_sum(losses, config.loss)
            guard.after_step(step, batch, loss, applied=engine.was_step_applied(), writing=checkpoints.writing)
            if step % config.log_every == 0 or step in (1, config.optim.last_step):
                log.write(step, losses, rate, engine)
            scores = None
            if evaluation and evaluation.due(step) and not stop.agreed:
                scores = evaluation.scores(engine, stop)
                log.evaluated(step, scores)
            if not guard.writing:
                checkpoints.publish()
            if step % config.checkpoint.every == 0 or step == config.optim.last_step or stop.agreed:
                score = scores.get("macro") if scores else None
                checkpoints.save(Meta(step, world, config.zero_stage, data.diseases, data.trained_on, score))
        checkpoints.finish()
        if step < config.optim.last_step:
            first_rank_does(lambda: stop.leave_mark(step), "leaving the mark of a stop")
        return step >= config.optim.last_step


def join_ranks(config: Config) -> tuple[int, int, torch.device]:
    """Join the process group -> rank, world size, device. ValueError for what can be told before anything is built."""
    config.check_sources()
    check_trackers(config.track)
    rank, world, device = start_distributed(config.threads, config.health.timeout_s)
    config.check_world(world)
    check_impl(config.loss.impl, device)
    return rank, world, device


def main(arguments: list[str]) -> int:
    """Exit code 2 with one line for what a user can mend, `stop.EXIT_CODE` after a stop on request."""
    arguments = [word for word in arguments if not word.startswith("--local_rank")]
    try:
        if not arguments:
            raise ValueError("usage: deepspeed --module mmclip_dist.train RECIPE [key=value ...]")
        config = load_config(arguments[0], arguments[1:])
        stop = StopRequest(Path(config.run_dir))
        exit_with_launcher(stop.ask)
        return 0 if train(config, stop) else EXIT_CODE
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
