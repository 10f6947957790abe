"""A rank that makes no progress ends itself, and says which rank it is, at which step, and what it was doing.

A collective call that one rank never joins hangs all others, where no exception reaches them. The process group's own
time-out names neither rank nor step, and covers neither a hung file system nor a hung loader.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

EXIT_CODE = 70
"""Exit code of a process that hung (EX_SOFTWARE). As it is not 0, the launcher ends the other ranks."""


@dataclass
class _Progress:
    step: int = 0
    doing: str = "starting"
    since: float = 0.0


_progress = _Progress()


def beat(doing: str | None = None, step: int | None = None) -> None:
    """Report progress. doing: what this process does from now on; None: the same as before."""
    _progress.since = time.monotonic()
    if doing is not None:
        _progress.doing = doing
    if step is not None:
        _progress.step = step


def rest() -> None:
    """Expect no progress until the next `beat`: what was watched is over, and the process goes on with something else."""
    _progress.since = math.inf


def start(rank: int, timeout_s: float) -> None:
    """Watch this process from a thread, which ends it after `timeout_s` without a `beat`."""
    beat("starting")

    def watch() -> None:
        while (left := _progress.since + timeout_s - time.monotonic()) > 0:
            time.sleep(min(left + 0.01, 1.0))
        print(
            f"failed: rank {rank} on {socket.gethostname()} hangs: no progress for {timeout_s:g} s at step {_progress.step}, in: "
            f"{_progress.doing}. The other rank of a collective call may have died or be slow; health.timeout_s sets how long to "
            "wait. Where it hangs:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
