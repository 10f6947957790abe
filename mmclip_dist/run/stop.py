"""Stopping a run from outside: SIGTERM, SIGUSR1 or a file `stop` in the run folder, on any rank, stops all at one step.

The run saves and ends with `EXIT_CODE`, on which the templates in launch/templates start it again. The `deepspeed` launcher
passes the code on when the ranks end by themselves (SIGUSR1 to a rank, the stop file), but answers a SIGTERM that it gets
itself with 1, and the outer one of its two processes dies of it: a preempted run therefore leaves `stopped.json`, too.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
from mmclip_shards.storage import write_atomic

from mmclip_dist.engine.collective import sums

EXIT_CODE = 75
"""Of a run that was asked to stop, has saved, and goes on when it is started again (EX_TEMPFAIL)."""
STOP_FILE, STOPPED = "stop", "stopped.json"
_LOOK_S = 1.0  # between two looks for the file: a shared file system answers to every machine


class StopRequest:
    """Whether the run shall stop: asked of this process (`wanted`), and agreed by all ranks (`agreed`)."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.agreed = run_dir, False
        self._reason: str | None = None
        self._looked = 0.0
        # One process of a machine looks for the file.
        self._looks = os.environ.get("LOCAL_RANK", "0") == "0"
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Ask for a stop, from any thread."""
        self._reason = self._reason or reason

    def wanted(self) -> bool:
        """Whether this process was asked; not a collective call."""
        if self._looks and self._reason is None and time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            if (self.run_dir / STOP_FILE).exists():
                self.ask("the stop file")
        return self._reason is not None

    def requested(self, device: torch.device) -> bool:
        """Whether any rank was asked: a collective call, for evaluation loops and others that all ranks walk in step."""
        self.agreed = self.agreed or sums(device, stop=self.wanted())["stop"] > 0
        return self.agreed

    def forget_file(self) -> None:
        """A new run begins, or this one obeys: neither the file nor the mark of an earlier stop holds any longer."""
        (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        (self.run_dir / STOPPED).unlink(missing_ok=True)

    def leave_mark(self, step: int) -> None:
        """Say in the run folder that the run stopped on request, whole, and at which step."""
        self.forget_file()
        mark = {"step": step, "reason": self._reason or "another rank was asked", "exit_code": EXIT_CODE}
        write_atomic(str(self.run_dir / STOPPED), json.dumps(mark).encode())
