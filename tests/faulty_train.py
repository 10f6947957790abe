"""Training in which a test can arrange for trouble: `deepspeed tests/faulty_train.py FAULT RECIPE key=value ...`

Every step takes a little longer, so that a test can hit the one it means.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mmclip_dist import train
from mmclip_dist.engine import checkpoint_writer
from mmclip_dist.engine.preemption import StopRequest

STEP_S = 0.2
EVALUATE_AT, BATCHES = 6, 600

write = train.ProgressLog.write
stops: list[StopRequest] = []


def slowly(self: train.ProgressLog, step: int, *rest: Any) -> None:
    write(self, step, *rest)
    time.sleep(STEP_S)


def evaluating(self: train.ProgressLog, step: int, losses: dict[str, torch.Tensor], rate: float, engine: Any) -> None:
    """An evaluation on all ranks, of 30 s, that heeds stop requests as one inside training shall."""
    slowly(self, step, losses, rate, engine)
    if step >= EVALUATE_AT and not stops[0].agreed:
        (Path(self.config.run_dir) / "evaluating").touch()
        for batch in range(BATCHES):
            if stops[0].requested(torch.device(engine.device)):
                print(f"evaluation ended after batch {batch} of {BATCHES}", flush=True)
                return
            time.sleep(0.05)


class Noted(StopRequest):
    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        stops.append(self)


def main(arguments: list[str]) -> int:
    fault, *arguments = [word for word in arguments if not word.startswith("--local_rank")]
    train.ProgressLog.write = slowly  # type: ignore[method-assign]
    if fault == "evaluation":
        train.StopRequest, train.ProgressLog.write = Noted, evaluating  # type: ignore[misc,method-assign]
    if fault == "bad loss" and os.environ["RANK"] == "1":  # from step 5 on
        weighted_sum, calls = train.weighted_sum, count(1)
        train.weighted_sum = lambda *sums: weighted_sum(*sums) + (torch.inf if next(calls) >= 5 else 0.0)
    if fault == "slow save" and os.environ["RANK"] == "1":
        read_back = checkpoint_writer.read_back

        def forever(path: Path, wanted: Any = None) -> Any:
            (path.parent.parent.parent / "saving").touch()
            time.sleep(600)
            return read_back(path, wanted)

        checkpoint_writer.read_back = forever
    if fault == "full disk":  # from the second checkpoint on, no file may be larger
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = checkpoint_writer.save_verified

        def full(state: Any, path: Path) -> Any:
            if "step-00000004" not in str(path) and os.environ["RANK"] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return save(state, path)

        checkpoint_writer.save_verified = full
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
