"""The training loop: from the newest checkpoint of a run folder to the last step, or until a stop is asked for.

Pretraining and fine-tuning run through it. The state of a run is its weights, its optimizer and one integer, the step: the order
of samples, the learning rate and the random masks follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from mmclip_kernels import check_impl
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.checkpoint.host_local import bring_here
from mmclip_dist.config import Checkpoint, Config, Loss
from mmclip_dist.data.seen import Seen
from mmclip_dist.data.training import TrainingData
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.collective import agreed
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, set_learning_rate
from mmclip_dist.engine.feed import Feed
from mmclip_dist.engine.gradient_cache import forward_backward, weighted_sum
from mmclip_dist.engine.heartbeat import beating
from mmclip_dist.launcher import first_of_machine
from mmclip_dist.model.build import Trainable
from mmclip_dist.model.classifier import Weights
from mmclip_dist.run.folder import describe, locked
from mmclip_dist.run.guard import Guard
from mmclip_dist.run.log import open_log
from mmclip_dist.run.shared import check_own, check_shared
from mmclip_dist.run.stop import StopRequest


class Place(NamedTuple):
    """Where this process stands among the ranks, as `start_distributed` tells."""

    rank: int
    world: int
    device: torch.device


class Evaluated(Protocol):
    """What scores a model while it is trained. Its calls are collective."""

    def due(self, step: int) -> bool:
        """Whether to score it after this step."""

    def missed(self, step: int) -> bool:
        """Whether a run that goes on from this step must first score it: a stop came in between, and what follows needs it."""

    def scores(self, engine: Any, stop: StopRequest) -> dict[str, float] | None:
        """Figures by class, and their mean, "macro"; None if a stop came in between."""


@dataclass(frozen=True)
class Work:
    """What a run trains, on what. weights: of the losses; text_width: of the text encoder, which reports are packed for; seen: a
    collective call that lists the patients and images of the training sets; enough: whether a run ends after this step, although
    steps are left: a collective call as well."""

    data: TrainingData
    model: Trainable
    weights: Loss | Weights
    tokenizer: PreTrainedTokenizerBase
    text_width: int
    evaluation: Evaluated | None = None
    seen: Callable[[], Seen | None] = lambda: None
    enough: Callable[[int], bool] = lambda step: False


def fit(config: Config, stop: StopRequest, place: Place, opened: Callable[[ExitStack], Work]) -> bool:
    """Train until `config.optim.last_step`, from the newest checkpoint of the run folder if there is one.

    opened: makes the work of this run; what it enters is held until the end. True if training reached its end; False if it
    stopped on request and can go on when it is started again.
    """
    rank, world, device = place
    from mmclip_dist.checkpoint.store import Checkpoints  # imports DeepSpeed, which needs the set-up of the ranks

    run_dir = Path(config.run_dir)
    with beating(config.health.lost_s), ExitStack() as held:
        if config.checkpoint.host_local:
            check_own(run_dir)
        with agreed():
            work, ds_json = _begun(config, stop, place, opened, held)
        _check_folders(run_dir, config.checkpoint)
        engine = build_engine(work.model.to(device), config, ds_json)
        checkpoints = Checkpoints(run_dir, engine, work.tokenizer, config, work.seen())
        step = checkpoints.resume(work.data.trained_on)
        guard = Guard(run_dir, stop, config.health, config.data.max_bad_fraction, device)
        batches = guard.counted(
            Feed(work.data.batches(rank, world, step), work.text_width, config.passes(world), config.shares, device)
        )
        log = held.enter_context(open_log(config, step, device))
        announce(config, device, work.data, step)

        def scored() -> dict[str, float] | None:
            scores = work.evaluation.scores(engine, stop) if work.evaluation else None
            log.evaluated(step, scores)
            return scores

        def save(scores: dict[str, float] | None) -> None:
            score = scores.get("macro") if scores else None
            checkpoints.save(Meta(step, world, config.zero_stage, work.data.diseases, work.data.trained_on, score))

        if work.evaluation and work.evaluation.missed(step):
            save(scored())
        while step < config.optim.last_step and not stop.agreed and not work.enough(step):
            watchdog.beat("waiting for data", step + 1)
            batch = log.wait_for(batches)
            rate = set_learning_rate(engine, step, config.optim)
            gradients = log.gradients(step + 1, engine, batch)
            losses = forward_backward(engine, batch, work.weights)
            engine.step()  # skipped on every rank if any gradient is not finite
            step += 1
            guard.after_step(
                step, batch, weighted_sum(losses, work.weights), applied=engine.was_step_applied(), writing=checkpoints.writing
            )
            if step % config.log_every == 0 or step in (1, config.optim.last_step):
                log.write(step, losses, rate, engine, gradients)
            with log.aside():
                due = work.evaluation and work.evaluation.due(step) and not stop.agreed
                scores = scored() if due else None
                if not guard.writing:
                    checkpoints.publish()
                if step % config.checkpoint.every == 0 or step == config.optim.last_step or stop.agreed:
                    save(scores)
        stopped = stop.agreed and step < config.optim.last_step
        guard.finish()
        checkpoints.finish()
        if stopped:
            checkpoints.once_a_folder(lambda: stop.leave_mark(step), "leaving the mark of a stop")
        return not stopped


def _begun(
    config: Config, stop: StopRequest, place: Place, opened: Callable[[ExitStack], Work], held: ExitStack
) -> tuple[Work, dict[str, Any]]:
    """The work and DeepSpeed's configuration; the first rank takes the run folder and describes the run there."""
    config.check_world(place.world)
    check_impl(config.loss.impl, place.device)
    ds_json = deepspeed_json(config, place.world, gpu=place.device.type == "cuda")
    work = opened(held)
    if place.rank == 0 or (config.checkpoint.host_local and first_of_machine()):
        held.enter_context(locked(Path(config.run_dir)))
        stop.forget_file()
    if place.rank == 0:
        describe(Path(config.run_dir), config, place.world, ds_json, work.data.identity)
    return work, ds_json


def _check_folders(run_dir: Path, settings: Checkpoint) -> None:
    """All ranks see one run folder; or each host has its own, and in it the newest checkpoint of the store. Collective."""
    if settings.host_local:
        check_shared(str(settings.url), "checkpoint.url")
        bring_here(run_dir, settings)
    else:
        check_shared(str(run_dir), "run_dir")


def announce(config: Config, device: torch.device, data: TrainingData, step: int) -> None:
    """What begins, in the words of the first rank."""
    if dist.get_rank():
        return
    print(f"kernels: {config.loss.impl} on {device.type}\n{data}", flush=True)
    if 0 < step < config.optim.last_step:
        print(f"going on from step {step} of {config.optim.last_step}", flush=True)
    if step >= config.optim.last_step:
        print(f"nothing left to train: step {step} of {config.optim.last_step} is done", flush=True)
