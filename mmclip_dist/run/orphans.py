"""End a rank that nobody else ends in time: its launcher is gone, or it waits for a rank that is.

The first would go on writing into a folder that the next run uses. The second would keep the job for half a minute.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from mmclip_dist.launcher import ranks_of_machine

EXIT_CODE = 143
_DEAF_S = 1.0  # after SIGTERM, whose handler runs at once unless the main thread is inside a library
ORPHAN_S = 25.0
"""Seconds that an orphan has to save."""
OWNER = "MMCLIP_OWNER_PID"
"""Environment variable with the process id of a job above the launcher, to be watched as well. The quick start sets it."""


def _watched() -> list[psutil.Process]:
    """The `deepspeed` launchers among our ancestors, and the job named by the environment."""
    ancestors = [process for process in psutil.Process().parents() if _is_launcher(process)]
    if OWNER in os.environ:
        ancestors.append(psutil.Process(int(os.environ[OWNER])))
    return ancestors


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return False
    return any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in words)


def _alive(process: psutil.Process) -> bool:
    """False also for a zombie, and for a process that ends between the two calls."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def exit_with_launcher(ask: Callable[[str], None], interval_s: float = 0.5) -> None:
    """Watch the launchers from a thread. If a launcher dies, request a stop (DeepSpeed's outer launcher does not forward
    SIGTERM), and end this process `ORPHAN_S` later if it still runs."""
    try:
        watched = _watched()
    except psutil.NoSuchProcess:
        sys.exit(EXIT_CODE)

    def watch() -> None:
        while all(_alive(process) for process in watched):
            time.sleep(interval_s)
        ask("its launcher is gone")
        time.sleep(ORPHAN_S)
        os._exit(EXIT_CODE)  # a rank may hang in a collective, where no exception reaches it

    threading.Thread(target=watch, name="exit-with-launcher", daemon=True).start()


def exit_if_deaf(heard: Callable[[], bool]) -> None:
    """Watch for SIGTERM from a thread. If the main thread does not hear it (it waits in a collective call, say) and another rank
    of this machine has ended, end this process and its children: nothing can come of it. Call it from the main thread.

    heard: whether a SIGTERM has reached the main thread.
    """
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(ours, 1):
            if number[0] != signal.SIGTERM:
                continue
            time.sleep(_DEAF_S)
            if not heard() and _another_rank_ended():
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()  # loader processes outlive SIGTERM
                os._exit(EXIT_CODE)

    threading.Thread(target=watch, name="exit-if-deaf", daemon=True).start()


def _another_rank_ended() -> bool:
    """Whether the launcher has fewer ranks than it started here. Ranks end together, after their last collective call."""
    launcher = psutil.Process().parent()
    return launcher is not None and sum(map(_alive, launcher.children())) < ranks_of_machine()
