"""A process of its own for `mmclip evaluate finetune`, in which a test can arrange for an end in the middle."""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from typing import Any

from mmclip_dist import fit
from mmclip_dist.cli import app, run


def main(arguments: list[str], alone: bool = True, at_step: int = 0, number: int = 0) -> int:
    """The exit code. alone: without a launcher's environment. number: signal that comes in the step counted from the start,
    at_step; it counts over all cells."""
    if alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    set_rate, steps = fit.set_learning_rate, count(1)

    def struck(*of: Any) -> float:
        if next(steps) == at_step:
            os.kill(os.getpid(), number)
        return set_rate(*of)

    fit.set_learning_rate = struck
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["mmclip", "evaluate", "finetune", *arguments]
    os.environ["COLUMNS"] = "200"
    try:
        return run(app)
    except SystemExit as stop:
        return int(stop.code or 0)
