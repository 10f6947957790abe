"""End a rank whose launcher is gone: it would go on writing into a folder that the next run uses."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

EXIT_CODE = 143
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
