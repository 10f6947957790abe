"""Stop a run from outside: SIGTERM, SIGUSR1 or a file `stop` in the run folder, on any rank, stops all ranks at the same step.

The run saves and ends with `EXIT_CODE`; the templates in launch/templates then start it again. The `deepspeed` launcher passes
this code on if the ranks end by themselves (SIGUSR1 to a rank, the stop file). If the launcher receives SIGTERM, it exits with 1.
So `stopped.json` in the run folder tells as well.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import FrameType

import torch
from mmclip_shards.storage import write_atomic

from mmclip_dist.engine.collective import sums
from mmclip_dist.launcher import first_of_machine
from mmclip_dist.run.marks import EXIT_CODE, STOP_FILE, STOPPED

_LOOK_S = 1.0  # seconds between two looks for the file: every machine asks the shared file system


class StopRequest:
    """Whether the run is to stop: `wanted` by this process, `agreed` by all ranks. heard: whether a signal asked for it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.agreed, self.heard = run_dir, False, False
        self._reason: str | None = None
        self._looked = 0.0
        # Only one process of a machine looks for the file.
        self._looks = first_of_machine()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Ask for a stop, from any thread."""
        self._reason = self._reason or reason

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for as far as is known, without a look for the file, whose disk may be dead."""
        return self._reason is not None

    def wanted(self) -> bool:
        """Whether this process was asked to stop. Not a collective call."""
        if self._looks and self._reason is None and time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            if (self.run_dir / STOP_FILE).exists():
                self.ask("the stop file")
        return self._reason is not None

    def requested(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop. A collective call, for loops that all ranks run in step."""
        self.agreed = self.agreed or sums(device, stop=self.wanted())["stop"] > 0
        return self.agreed

    def forget_file(self) -> None:
        """Delete the stop file and the mark of an earlier stop: a run starts, or has obeyed."""
        (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        (self.run_dir / STOPPED).unlink(missing_ok=True)

    def leave_mark(self, step: int) -> None:
        """Write stopped.json: the run stopped on request at this step, and its checkpoint is whole."""
        self.forget_file()
        mark = {"step": step, "reason": self._reason or "another rank was asked", "exit_code": EXIT_CODE}
        write_atomic(str(self.run_dir / STOPPED), json.dumps(mark).encode())
