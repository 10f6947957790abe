"""Training: `deepspeed --module mmclip_dist.train RECIPE key=value ...`

Joins the ranks, opens the sets, builds the model and runs `fit.py`'s loop; tells errors and ends the process.
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
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.utils.data._utils as loader_inside

from mmclip_dist import errors
from mmclip_dist.checkpoint.folder import newest_checkpoint, read_meta
from mmclip_dist.config import Config, load_config
from mmclip_dist.data.seen import SEEN, Seen, load_seen
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.data.training import TrainingData, open_training_data
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.collective import AgreedError, AgreedFailure, agreed, broken, gathered, place
from mmclip_dist.engine.deepspeed_engine import start_distributed
from mmclip_dist.evaluate.during_training import EvaluationDuringTraining
from mmclip_dist.fit import Place, Work, fit
from mmclip_dist.launcher import first_of_machine, ranks_of_machine
from mmclip_dist.model.build import build_model
from mmclip_dist.run.mounts import check_answering
from mmclip_dist.run.orphans import exit_if_deaf, exit_with_launcher
from mmclip_dist.run.output import outlast_readers
from mmclip_dist.run.stop import EXIT_CODE, StopRequest
from mmclip_dist.run.trackers import check_trackers

_OTHER_RANK_S = 20.0  # a failed rank may take so long to print its error and end


def train(config: Config, stop: StopRequest) -> bool:
    """Train until `config.optim.last_step`, from the newest checkpoint of the run folder if there is one.

    True if training reached its end; False if it stopped on request and can go on when it is started again.
    """
    rank, world, device = join_ranks(config)

    def opened(held: ExitStack) -> Work:
        tokenizer = load_tokenizer(str(config.model.text.tokenizer_name))
        data = held.enter_context(open_training_data(config, tokenizer, world))
        model = build_model(config, tokenizer, data.diseases)
        evaluation = EvaluationDuringTraining(config, tokenizer, data.trained_on) if config.evaluation.sets else None
        seen = partial(seen_by_all, Path(config.run_dir), data, rank, world)
        return Work(data, model, config.loss, tokenizer, model.text.width, evaluation, seen)

    return fit(config, stop, Place(rank, world, device), opened)


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


def join_ranks(config: Config) -> tuple[int, int, torch.device]:
    """Join the process group -> rank, world size, device. ValueError for faults that need no other rank to see."""
    config.check_sources()
    check_trackers(config.track)
    if first_of_machine():
        check_answering(config.places)
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
        signal.signal(signal.SIGINT, lambda *_: stop.ask("SIGINT"))  # Ctrl-C reaches all ranks of a terminal, and the launcher
        outlast_readers(stop.ask)
        exit_with_launcher(stop.ask)
        exit_if_deaf(lambda: stop.heard)
        return 0 if train(config, stop) else EXIT_CODE
    except Exception as error:
        end_loader_processes()
        if "MMCLIP_DEBUG" in os.environ:
            raise
        return tell(error, ending=stop is not None and stop.asked)
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

    Before the ranks have joined, nearly all that can fail is the same for every rank of a machine, whose first rank speaks.
    The others wait for it: the launcher ends all ranks as soon as one has ended, and the first may have said nothing yet.
    ending: whether this rank was asked to stop, as the launcher does when another one has failed.
    """
    code = errors.exit_code(error)
    joined = dist.is_initialized()
    first = first_of_machine()
    trace = traceback.format_exc() if code is None else ""
    if joined and isinstance(error, AgreedError | AgreedFailure):
        speaks, where = dist.get_rank() == 0, ""
    elif joined and broken(error):
        outlived = _outlives_others(ending)  # the rank that failed was on another machine
        speaks, trace = first and outlived, ""
        where = f"{place()}, because another rank or its machine ended"
    elif joined:
        speaks, where = True, place()
    else:
        speaks = first or code is None or _outlives_others(ending)
        alone = int(os.environ.get("WORLD_SIZE", "1")) == ranks_of_machine()
        where = "" if alone else socket.gethostname()
    if speaks:
        print(f"{trace}{errors.line(error, where)}", file=sys.stderr, flush=True)
    return code or errors.FAILED


def _outlives_others(ending: bool) -> bool:
    """Whether this rank is still wanted after the time in which the launcher ends it, had another rank of its machine ended."""
    if ending:
        return False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_OTHER_RANK_S)
    return True


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
