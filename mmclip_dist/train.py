"""Training: `deepspeed --module mmclip_dist.train RECIPE key=value ...`

Builds the sets, the loader, the model, the engine and the run folder, then loops. The state of a run is its weights,
its optimizer and one integer, the step: the order of samples, the learning rate and the random masks follow from it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.utils.data._utils as loader_inside
from mmclip_kernels import check_impl

from mmclip_dist import errors
from mmclip_dist.checkpoint.folder import Meta, newest_checkpoint, read_meta
from mmclip_dist.config import Config, load_config
from mmclip_dist.data.seen import SEEN, Seen, load_seen
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.data.training import TrainingData, open_training_data
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.collective import AgreedError, AgreedFailure, agreed, broken, first_rank_does, gathered, place
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, set_learning_rate, start_distributed
from mmclip_dist.engine.feed import Feed
from mmclip_dist.engine.gradient_cache import forward_backward, weighted_sum
from mmclip_dist.engine.heartbeat import beating
from mmclip_dist.evaluate.during_training import EvaluationDuringTraining
from mmclip_dist.launcher import ranks_of_machine
from mmclip_dist.model.build import build_model
from mmclip_dist.run.folder import describe, locked
from mmclip_dist.run.guard import Guard
from mmclip_dist.run.log import open_log
from mmclip_dist.run.orphans import exit_if_deaf, exit_with_launcher
from mmclip_dist.run.shared import check_shared
from mmclip_dist.run.stop import EXIT_CODE, StopRequest
from mmclip_dist.run.trackers import check_trackers

_OTHER_RANK_S = 20.0  # a failed rank may take so long to print its error and end


def train(config: Config, stop: StopRequest) -> bool:
    """Train until `config.optim.last_step`, from the newest checkpoint of the run folder if there is one.

    True if training reached its end; False if it stopped on request and can go on when it is started again.
    """
    rank, world, device = join_ranks(config)
    from mmclip_dist.checkpoint.store import Checkpoints  # imports DeepSpeed, which needs the set-up above

    run_dir, first = Path(config.run_dir), rank == 0
    with beating(config.health.lost_s), ExitStack() as held:
        with agreed():
            config.check_world(world)
            check_impl(config.loss.impl, device)
            ds_json = deepspeed_json(config, world, gpu=device.type == "cuda")
            tokenizer = load_tokenizer(config.model.text.tokenizer or config.model.text.pretrained)
            data = held.enter_context(open_training_data(config, tokenizer, world))
            model = build_model(config, tokenizer, data.diseases)
            evaluation = EvaluationDuringTraining(config, tokenizer, data.trained_on) if config.evaluation.sets else None
            if first:
                held.enter_context(locked(run_dir))
                describe(run_dir, config, world, ds_json, data.identity)
                stop.forget_file()
        check_shared(run_dir)
        engine = build_engine(model.to(device), config, ds_json)
        checkpoints = Checkpoints(run_dir, engine, tokenizer, config, seen_by_all(run_dir, data, rank, world))
        step = checkpoints.resume(data.trained_on)
        guard = Guard(run_dir, stop, config.health, config.data.max_bad_fraction, device)
        batches = guard.counted(
            Feed(data.batches(rank, world, step), model.text.width, config.passes(world), config.shares, device)
        )
        log = held.enter_context(open_log(config, step, device))
        announce(config, device, data, step)

        while step < config.optim.last_step and not stop.agreed:
            watchdog.beat("waiting for data", step + 1)
            batch = log.wait_for(batches)
            rate = set_learning_rate(engine, step, config.optim)
            gradients = log.gradients(step + 1, engine, batch)
            losses = forward_backward(engine, batch, config.loss)
            engine.step()  # skipped on every rank if any gradient is not finite
            step += 1
            guard.after_step(
                step, batch, weighted_sum(losses, config.loss), applied=engine.was_step_applied(), writing=checkpoints.writing
            )
            if step % config.log_every == 0 or step in (1, config.optim.last_step):
                log.write(step, losses, rate, engine, gradients)
            with log.aside():
                scores = None
                if evaluation and evaluation.due(step) and not stop.agreed:
                    scores = evaluation.scores(engine, stop)
                    log.evaluated(step, scores)
                if not guard.writing:
                    checkpoints.publish()
                if step % config.checkpoint.every == 0 or step == config.optim.last_step or stop.agreed:
                    score = scores.get("macro") if scores else None
                    checkpoints.save(Meta(step, world, config.zero_stage, data.diseases, data.trained_on, score))
        guard.finish()
        checkpoints.finish()
        if step < config.optim.last_step:
            first_rank_does(lambda: stop.leave_mark(step), "leaving the mark of a stop")
        return step >= config.optim.last_step


def seen_by_all(run_dir: Path, data: TrainingData, rank: int, world: int) -> Seen:
    """Patients and images of the training sets, as the run's newest checkpoint tells them if it trained on the same shards. A
    collective call: else each rank reads a share of the documents."""
    watchdog.beat("listing the patients of the training sets")
    with agreed():
        newest = newest_checkpoint(run_dir)
        if newest is not None and (newest / SEEN).is_file() and read_meta(newest).trained_on == data.trained_on:
            with suppress(ValueError):  # a damaged checkpoint: `resume` takes an older one
                return load_seen(newest / SEEN)
        share = data.seen(rank, world)
    return Seen.joined(gathered(share))


def announce(config: Config, device: torch.device, data: TrainingData, step: int) -> None:
    """What begins, in the words of the first rank."""
    if dist.get_rank():
        return
    print(f"kernels: {config.loss.impl} on {device.type}\n{data}", flush=True)
    if step >= config.optim.last_step:
        print(f"nothing left to train: step {step} of {config.optim.last_step} is done", flush=True)


def join_ranks(config: Config) -> tuple[int, int, torch.device]:
    """Join the process group -> rank, world size, device. ValueError for faults that need no other rank to see."""
    config.check_sources()
    check_trackers(config.track)
    return start_distributed(config.threads, config.health.timeout_s)


def main(arguments: list[str]) -> int:
    """0 at the end of training, `stop.EXIT_CODE` after a stop on request, else as in `mmclip_dist.errors`."""
    arguments = [word for word in arguments if not word.startswith("--local_rank")]
    stop = None
    try:
        if not arguments:
            raise ValueError("usage: deepspeed --module mmclip_dist.train RECIPE [key=value ...]")
        config = load_config(arguments[0], arguments[1:])
        stop = StopRequest(Path(config.run_dir))
        exit_with_launcher(stop.ask)
        exit_if_deaf(lambda: stop.heard)
        return 0 if train(config, stop) else EXIT_CODE
    except Exception as error:
        end_loader_processes()
        if "MMCLIP_DEBUG" in os.environ:
            raise
        return tell(error, ending=stop is not None and stop.wanted())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def end_loader_processes() -> None:
    """Kill this rank's loader processes. They outlive SIGTERM, which a stop on request needs: after an error, interpreter and
    launcher would wait for them for a minute and more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a loader that was killed
    loader_inside.python_exit_status = True  # DataLoader then leaves its processes alone: one killed with a lock would hang it
    for process in multiprocessing.active_children():
        process.kill()


def tell(error: Exception, *, ending: bool) -> int:
    """Print an error of this rank, unless another rank prints it; the exit code. A bug gets its traceback.

    Before the ranks have joined, all that can fail is the same for every rank of a machine: its first rank speaks.
    ending: whether this rank was asked to stop, as the launcher does when another one has failed.
    """
    code = errors.exit_code(error)
    joined = dist.is_initialized()
    first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
    trace = traceback.format_exc() if code is None else ""
    if joined and isinstance(error, AgreedError | AgreedFailure):
        speaks, where = dist.get_rank() == 0, ""
    elif joined and broken(error):
        # On one machine the launcher ends this rank once the failed one is gone. Still alive after that: it was elsewhere.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(0 if ending else _OTHER_RANK_S)
        speaks, trace = first_of_machine and not ending, ""
        where = f"{place()}, because another rank or its machine ended"
    elif joined:
        speaks, where = True, place()
    else:
        speaks = first_of_machine or code is None
        alone = int(os.environ.get("WORLD_SIZE", "1")) == ranks_of_machine()
        where = "" if alone else socket.gethostname()
    if speaks:
        print(f"{trace}{errors.line(error, where)}", file=sys.stderr, flush=True)
    return code or errors.FAILED


def leave(code: int) -> NoReturn:
    """End this process. After a failure at once: an interpreter with torch and its threads takes seconds to end, for which the
    launcher and the other ranks would wait."""
    if code in (0, EXIT_CODE):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
