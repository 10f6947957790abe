"""Training in which a test can arrange for trouble: `deepspeed tests/faulty_train.py FAULT RECIPE key=value ...`

Every step takes a little longer, so that a test can hit the one it means.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mmclip_dist import fit, train
from mmclip_dist.checkpoint import mirror, writer
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.engine import gradient_cache
from mmclip_dist.evaluate import reading, zeroshot
from mmclip_dist.run import shared
from mmclip_dist.run.log import ProgressLog

ERRORS = {
    "damaged shard": ValueError("shard 7 is damaged: copy it again"),
    "store down": OSError("no answer from the store for 120 s"),
    "bug": KeyError("gone"),
}
STEP_S = 0.2
ROUND_S = 2.5  # of an evaluation, which then takes 30 s

write, rounds = ProgressLog.write, zeroshot.Evaluation.rounds


def slowly(self: ProgressLog, step: int, *rest: Any) -> None:
    write(self, step, *rest)
    time.sleep(STEP_S)


def endless(read_back: Any) -> Any:
    def forever(path: Path, wanted: Any = None) -> Any:
        (path.parent.parent.parent / "saving").touch()
        time.sleep(600)
        return read_back(path, wanted)

    return forever


def told(upload: Any) -> Any:
    def upload_and_tell(path: Any, url: str) -> None:
        upload(path, url)
        print(f"uploaded {url}", flush=True)

    return upload_and_tell


def main(arguments: list[str]) -> int:
    fault, *arguments = [word for word in arguments if not word.startswith("--local_rank")]
    ProgressLog.write = slowly  # type: ignore[method-assign]
    if fault == "evaluation":
        (run_dir,) = [word.removeprefix("run_dir=") for word in arguments if word.startswith("run_dir=")]

        def slow_rounds(*of: Any) -> Iterator[list[zeroshot.Scored]]:
            (Path(run_dir) / "evaluating").touch()
            for some in rounds(*of):
                time.sleep(ROUND_S)
                yield some

        zeroshot.Evaluation.rounds, reading.BATCH = slow_rounds, 1  # type: ignore[method-assign]
    if fault == "bad loss" and os.environ["RANK"] == "1":  # from step 5 on
        weighted_sum, calls = gradient_cache.weighted_sum, count(1)
        gradient_cache.weighted_sum = lambda *sums: weighted_sum(*sums) + (torch.inf if next(calls) >= 5 else 0.0)
    if fault == "slow save" and os.environ["RANK"] == "1":
        writer.read_back = endless(writer.read_back)
    if fault in ERRORS and os.environ["RANK"] == "1":  # when it reads its 20th sample
        calls, read = count(1), JoinedSet.read

        def failing(self: JoinedSet, *of: Any) -> Any:
            if next(calls) == 20:
                raise ERRORS[fault]
            return read(self, *of)

        JoinedSet.read = failing  # type: ignore[method-assign]
    if fault == "told uploads":
        mirror.upload = told(mirror.upload)
    if fault in ("another folder", "own disks") and os.environ["RANK"] == "1":  # as the only rank of another machine
        shared._SEEN_S, os.environ["LOCAL_RANK"] = 0.5, "0"
        arguments = [f"{word}-elsewhere" if word.startswith("run_dir=") else word for word in arguments]
    if fault.startswith("out of memory"):  # at step 5 on rank 1, while every loader process of two a rank waits for its store
        (run_dir,) = [word.removeprefix("run_dir=") for word in arguments if word.startswith("run_dir=")]
        set_rate, steps, reads, read = fit.set_learning_rate, count(1), count(1), JoinedSet.read

        def waiting(self: JoinedSet, *of: Any) -> Any:
            if next(reads) > 16:  # two samples of each of the five steps, and of those that are fetched ahead
                time.sleep(600)
            return read(self, *of)

        def exhausted(*of: Any) -> float:
            at = next(steps)
            if at == 5 and os.environ["RANK"] == "0" and fault == "out of memory, others deaf":
                lock = ctypes.create_string_buffer(64)
                for _ in range(2):  # waits for ever, as a collective call of NCCL does
                    ctypes.CDLL(None).pthread_mutex_lock(lock)
            if at == 5 and os.environ["RANK"] == "1":
                (Path(run_dir) / "struck").touch()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return set_rate(*of)

        fit.set_learning_rate, JoinedSet.read = exhausted, waiting  # type: ignore[method-assign]
    if fault == "full disk":  # from the second checkpoint on, no file may be larger
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = writer.save_verified

        def full(state: Any, path: Path) -> Any:
            if "step-00000004" not in str(path) and os.environ["RANK"] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return save(state, path)

        writer.save_verified = full
    return train.main(arguments)


if __name__ == "__main__":
    train.leave(main(sys.argv[1:]))
